"""Fixtures: nothing that a test sets in the process outlives it."""

import os
import sys

if not os.environ.get("FUSEOPT_TEST_DEVICE"):
    os.environ["TRITON_INTERPRET"] = "1"  # before triton, which the construction of any torch optimizer imports
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve a shared machine

import emulated
import pytest
import torch

import fuseopt
from fuseopt import cpu, torch_abi, torch_layout, triton_driver

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.join(ROOT, "fuseopt") in fuseopt.__path__:  # not installed: kernels/ lies beside fuseopt/
    fuseopt.__path__.append(ROOT)
if triton_driver.why_not() is None and os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.mend()

WHY_NOT = {
    "cpu": cpu.native_error(),
    "cuda": emulated.why_not,
    "triton": triton_driver.why_not(),
    "torch": None,
}


@pytest.fixture(params=WHY_NOT)
def backend(request):
    """Each backend in turn; the kernels of CUDA are compiled for the CPU, those of Triton interpreted."""
    if WHY_NOT[request.param]:
        pytest.skip(WHY_NOT[request.param])
    return request.param


# Triton is interpreted, at milliseconds a program: of the tests of `backend` it runs those where more than the bits of
# the kernels is at stake, which test_triton.py compares.
ON_TRITON = {
    "test_a_gradient_on_another_device_is_refused",
    "test_a_late_parameter_is_copied_at_its_first_update",
    "test_a_mask_can_be_replaced_and_removed",
    "test_a_mask_is_no_gradient_of_negative_zero",
    "test_a_step_that_is_refused_changes_nothing",
    "test_a_tensor_learning_rate_stays_the_same_object",
    "test_a_tensor_that_requires_no_gradient_but_has_one_is_stepped",
    "test_a_threshold_set_between_steps",
    "test_clip_is_global_over_groups_and_dtypes",
    "test_copies_share_nothing",
    "test_counters_follow_the_default_type",
    "test_distributed_checkpoint_may_make_state_with_an_empty_step",
    "test_grad_scaler_drives_it_as_it_drives_torch",
    "test_masks_broadcast",
    "test_options_edited_between_steps_count_from_the_next",
    "test_parameters_without_gradient_are_pruned_too",
    "test_pruned_entries_that_are_frozen_later_count_as_pruned",
    "test_statistics_count_what_is_not_finite",
    "test_step_counts_belong_to_parameters",
    "test_versions_tell_what_was_stepped",
    "test_what_the_step_cannot_change_is_not_in_the_norm",
}


def pytest_collection_modifyitems(items):
    """Leave out what Triton need not run."""
    chosen = [
        item
        for item in items
        if getattr(getattr(item, "callspec", None), "params", {}).get("backend") != "triton"
        or item.originalname in ON_TRITON
    ]
    items[:] = chosen


@pytest.fixture
def native():
    """The compiled module; its instruction set, its reader and torch's threads are put back afterwards."""
    if cpu.native_error():
        pytest.skip(cpu.native_error())
    from fuseopt import _C

    chosen, threads = _C.instruction_set(), torch.get_num_threads()
    yield _C
    _C.set_instruction_set(chosen)
    cpu.connect(_C, *torch_abi.find(), torch_layout.find())
    torch.set_num_threads(threads)


@pytest.fixture
def accelerate_afresh():
    """accelerate keeps one state for the process, which the first Accelerator settles; none outlives the test."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of small pretrained models, one of each kind of starts.py."""
    from starts import make_checkpoints  # needs transformers

    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))
