"""The harness's loss, learning-rate schedules and gradient compression."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import compressed
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from fuseopt.__main__ import main
from fuseopt.finetune.communication import CommunicationOptions, check_communication
from fuseopt.finetune.data import Pixels, load
from fuseopt.finetune.loss import LossOptions, check_loss, compute_loss, ready_teacher
from fuseopt.finetune.models import EMBEDDED
from fuseopt.finetune.options import parse
from fuseopt.finetune.prepare import prepare
from fuseopt.finetune.schedule import ScheduleOptions, make_scheduler
from fuseopt.finetune.teacher import load as load_teacher


def arguments(**options):
    return TrainingArguments("unused", **{"use_cpu": True, "report_to": []} | options)


class Net(nn.Module):
    """Logits from `pixel_values` (N, 5), as a model of transformers returns them."""

    def __init__(self, classes=3, seed=0, names=None):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.drop = nn.Linear(5, classes), nn.Dropout(0.5)
        self.config = SimpleNamespace(id2label=dict(enumerate(names or [])))

    def forward(self, pixel_values):
        return SimpleNamespace(
            logits=self.drop(self.layer(pixel_values)) if self.training else self.layer(pixel_values)
        )


def batch(number=8, width=5):
    torch.manual_seed(3)
    return {"pixel_values": torch.randn(number, width), "labels": torch.arange(number) % 3}


def softmax(logits):
    """Row by row in Python's doubles."""
    rows = [[math.exp(x) for x in row] for row in logits.tolist()]
    return [[x / sum(row) for x in row] for row in rows]


def student():
    model = Net()
    model.drop.p = 0.0
    return model


# ---- loss ------------------------------------------------------------------------------------------


def test_distillation_and_smoothing_follow_the_formula():
    model, teacher, inputs = student(), Net(seed=1), batch()
    options, args = LossOptions(teacher="t", temperature=3.0, distill_weight=0.3), arguments(label_smoothing_factor=0.2)
    teacher = ready_teacher(teacher, model, inputs, "abc", "--teacher t")
    loss, outputs = compute_loss(model.train(), inputs, teacher, options, args)
    p, logits = softmax(outputs.logits), teacher(inputs["pixel_values"]).logits
    soft, target = softmax(outputs.logits / 3), softmax(logits / 3)
    labels = inputs["labels"].tolist()
    entropy = [-0.8 * math.log(p[i][y]) - 0.2 / 3 * sum(map(math.log, p[i])) for i, y in enumerate(labels)]
    kl = [sum(t * math.log(t / s) for t, s in zip(target[i], soft[i], strict=True)) for i in range(8)]
    expected = sum(0.7 * e + 0.3 * 9 * k for e, k in zip(entropy, kl, strict=True)) / 8
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    model.eval()  # evaluation: nothing but cross entropy
    assert float(compute_loss(model, inputs, teacher, options, args, 100)[0]) == pytest.approx(
        -sum(math.log(p[i][y]) for i, y in enumerate(labels)) / 8, rel=1e-5
    )


@pytest.mark.parametrize("words", ["--reinit neck.*", "--lora_rank 2 --lora_targets conv1", "--head_init zeros"])
def test_the_teacher_is_what_its_folder_holds(words):
    """What begins anew or is adapted is the student's."""
    options, _ = parse(["--teacher", str(EMBEDDED), "--classes", *"01234", *words.split()])
    state = load_teacher(options, load(options, 0), None).model.state_dict()
    saved = load_file(EMBEDDED / "model.safetensors")
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)


def test_a_teacher_sees_what_it_was_trained_on(tmp_path):
    with pytest.raises(ValueError, match="this is a file: give the folder"):
        prepared(tmp_path, EMBEDDED / "model.safetensors")
    folder = shutil.copytree(EMBEDDED, tmp_path / "teacher")
    assert prepared(tmp_path, folder).processor.mean == Pixels.from_pretrained(folder).mean
    settings = folder / "preprocessor_config.json"
    mean = json.loads(settings.read_text())["image_mean"]
    settings.write_text(settings.read_text().replace(str(mean[0]), "0.9"))
    with pytest.raises(ValueError, match="--teacher: its image sizes, means and deviations are not those"):
        prepared(tmp_path, folder, "--pretrained", EMBEDDED)
    settings.unlink()
    assert prepared(tmp_path, folder).trainer.teacher  # of the normalisation that the run fits


def prepared(tmp_path, folder, *more):
    words = ["--teacher", folder, "--classes", *"01234", "--output_dir", tmp_path / "run", "--overwrite", *more]
    return prepare(*parse([*map(str, words)]))


def test_the_teacher_neither_learns_nor_drops_out():
    model, inputs = student(), batch()
    teacher = ready_teacher(Net(seed=1).train(), model, inputs, "abc", "--teacher t")
    random = torch.get_rng_state()
    loss, _ = compute_loss(model, inputs, teacher, LossOptions(teacher="t"), arguments())
    loss.backward()
    assert torch.equal(random, torch.get_rng_state())
    assert not teacher.training and all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("distill", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(distill):
    """The real Trainer: 30 rows in one batch, or in four of 8, 8, 8 and 6."""
    found = []
    for size, parts in ((32, 1), (8, 4)):
        options = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": parts,
            "label_smoothing_factor": 0.1,
        }
        made = compressed.trainer(30, **options)
        if distill:
            made.teacher = compressed.trainer(30).model.eval()
            nn.init.normal_(made.teacher.classifier.weight)
        found.append(compressed.weights(made))
        assert made.state.global_step == 4
    for name, p in found[0].items():
        torch.testing.assert_close(found[1][name], p, rtol=1e-9, atol=1e-12)
    assert not torch.equal(found[0]["classifier.weight"], compressed.trainer(30).model.classifier.weight)


@pytest.mark.parametrize(
    "options, smoothing, message",
    [
        ({"temperature": 4.0}, 0.0, "--temperature 4.0 has no effect without --teacher"),
        ({"teacher": "t", "temperature": 0.0}, 0.0, "--temperature 0.0: must be a finite number more than 0"),
        ({"teacher": "t", "distill_weight": 1.5}, 0.0, "--distill_weight 1.5: must be from 0 to 1"),
        ({"teacher": "t", "teacher_scale": 2.0}, 0.0, "--teacher and --teacher_scale: give one"),
        ({"teacher_scale": 0.0}, 0.0, "--teacher_scale 0.0: must be"),
        ({}, 1.0, "--label_smoothing_factor 1.0: must be in [0, 1)"),
    ],
)
def test_bad_loss_options(options, smoothing, message):
    with pytest.raises(ValueError) as caught:
        check_loss(LossOptions(**options), arguments(label_smoothing_factor=smoothing))
    assert str(caught.value).startswith(message)


def test_a_teacher_that_does_not_fit():
    for teacher, message in (
        (Net(classes=4), "--teacher t has 4 classes, the data have 3: a, b, c"),
        (Net(names="cba"), "--teacher t has the classes c, b, a, the data a, b, c, in this order"),
    ):
        with pytest.raises(ValueError) as caught:
            ready_teacher(teacher, Net(), batch(), list("abc"), "--teacher t")
        assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"--teacher t does not take the inputs of this run \(pixel_values \(8, 7\)\)"):
        ready_teacher(Net(), Net(), batch(width=7), list("abc"), "--teacher t")
    bert = compressed.trainer().model
    other = type(bert)(type(bert.config)(**bert.config.to_dict() | {"vocab_size": 30})).double()
    text = {name: torch.tensor([[1, 2]]) for name in ("input_ids", "attention_mask")} | {"labels": torch.tensor([0])}
    assert ready_teacher(bert, bert, text, list("abc"), "--teacher t") is bert  # its names are LABEL_0 and so on
    with pytest.raises(ValueError, match="--teacher t: its vocabulary has 30 tokens, the model's 20"):
        ready_teacher(other, bert, text, list("abc"), "--teacher t")


# ---- schedules -------------------------------------------------------------------------------------


def rates(steps, evaluations=(), **options):
    """The learning rate, of 1, at each step; `evaluations` are (step, loss) behind it."""
    names = {field: options.pop(field) for field in list(options) if field in ScheduleOptions.__dataclass_fields__}
    args = arguments(eval_strategy="epoch", **options)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make_scheduler(ScheduleOptions(**names), args, optimizer, steps), []
    for t in range(1, steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if names["schedule"] != "plateau":
            scheduler.step()
        for step, loss in evaluations:
            if step == t:
                scheduler.step(loss)
    return found


def test_schedules_after_a_warmup():
    warm = [0, 0.25, 0.5, 0.75]
    assert rates(8, schedule="fixed", warmup_steps=4) == [*warm, 1, 1, 1, 1]
    assert rates(8, schedule="linear", warmup_steps=4) == [*warm, 1, 0.75, 0.5, 0.25]
    cosine = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates(8, schedule="cosine", warmup_steps=4) == pytest.approx([*warm, *cosine])
    assert rates(8, schedule="step", step_size=2, step_gamma=0.5, warmup_steps=4) == [*warm, 1, 1, 0.5, 0.5]
    assert rates(6, schedule="step") == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])  # by default a third


def test_plateau_counts_evaluations_without_a_better_loss():
    evaluations = [
        (1, 0.1),
        (5, 1.0),
        (6, 0.5),
        (7, 0.7),
        (8, 0.6),
        (9, 0.4),
        (10, 0.8),
    ]  # that of the warmup is not heard
    found = rates(11, evaluations, schedule="plateau", step_size=2, step_gamma=0.5, warmup_steps=4)
    assert found == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5, 0.5, 0.5]


def test_plateau_continues_from_its_state():
    def scheduler(optimizer):
        args = arguments(eval_strategy="epoch", warmup_steps=4)
        return make_scheduler(ScheduleOptions("plateau", step_size=1), args, optimizer, 20), args

    one, two = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2))
    (first, args), (second, _) = scheduler(one), scheduler(two)
    assert args.metric_for_best_model == "loss" and args.greater_is_better is False
    for _ in range(3):
        one.step()
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    for optimizer, plateau in ((one, first), (two, second)):
        for _ in range(3):
            optimizer.step()
        for loss in (1.0, 2.0):
            plateau.step(loss)
    assert one.param_groups[0]["lr"] == two.param_groups[0]["lr"] == pytest.approx(0.1)


def test_plateau_warms_up_in_a_run(tmp_path):
    """The Trainer's optimizer is accelerate's wrapper, which takes no step hooks."""
    words = "--schedule plateau --warmup_steps 2 --max_steps 4 --logging_steps 1 --save_strategy no --disable_tqdm true"
    assert main(["finetune", "--output_dir", str(tmp_path / "run"), *words.split()]) == 0
    curves = json.loads((tmp_path / "run" / "metrics.json").read_text())["curves"]
    rates = [row["learning_rate"] for row in curves if "learning_rate" in row]
    assert rates == pytest.approx([0.0005, 0.001, 0.001, 0.001])  # as the step leaves them


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"schedule": "cosine", "lr_scheduler_type": "polynomial"},
            "--lr_scheduler_type polynomial with --schedule cosine: give one",
        ),
        ({"schedule": "plateau", "eval_strategy": "no"}, "--schedule plateau needs evaluations"),
        ({"schedule": "step", "step_gamma": 1.0}, "--step_gamma 1.0: must be in (0, 1)"),
        ({"schedule": "step", "step_size": 0}, "--step_size 0: must be"),
        ({"schedule": "cosine", "step_size": 5}, "--step_size 5 has no effect without --schedule step or plateau"),
        ({"schedule": None, "step_gamma": 0.5}, "--step_gamma 0.5 has no effect"),
        ({"schedule": "linear", "warmup_steps": 30}, "--warmup_steps 30 is more than the 20 steps"),
    ],
)
def test_bad_schedules(options, message):
    names = {k: v for k, v in options.items() if k in ScheduleOptions.__dataclass_fields__}
    args = arguments(**{k: v for k, v in options.items() if k not in names})
    with pytest.raises(ValueError) as caught:
        make_scheduler(ScheduleOptions(**names), args, torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 20)
    assert str(caught.value).startswith(message)


def test_no_schedule_leaves_it_to_the_trainer():
    assert make_scheduler(ScheduleOptions(), arguments(), None, 20) is None


# ---- compression -----------------------------------------------------------------------------------


def test_compression_needs_two_processes_and_powersgd_no_resumption():
    for options, world, checkpoint, message in (
        ("fp16", 1, None, "--compress fp16: this is one process, which sends nothing"),
        ("powersgd", 2, "last", "--compress powersgd with --resume_from_checkpoint"),
    ):
        args = SimpleNamespace(world_size=world, resume_from_checkpoint=checkpoint)
        with pytest.raises(ValueError) as caught:
            check_communication(CommunicationOptions(options), args)
        assert str(caught.value).startswith(message)
    check_communication(CommunicationOptions("bf16"), SimpleNamespace(world_size=2, resume_from_checkpoint="last"))
