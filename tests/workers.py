"""What test_faults.py runs in forked and spawned workers: in a module of its own, which they can import."""

import torch
from cases import all_params, parameters, run

import fuseopt


class Data(torch.utils.data.Dataset):
    """Rows, made by an optimizer that steps in the worker if `steps` is set."""

    def __init__(self, steps: bool):
        self.steps = steps

    def __len__(self):
        return 8

    def __getitem__(self, k):
        if not self.steps:
            return torch.full((4,), float(k))
        params = parameters([(300, 300)], seed=k)
        return run(fuseopt.AdamW(params), params, 2).param_groups[0]["params"][0].detach()[0, :4]


def train_in_child(opt, out) -> None:
    run(opt, all_params(opt), 2, first=3)
    out.put([p.detach().numpy().copy() for p in all_params(opt)])
