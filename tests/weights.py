"""What a model's weights are, and what their averages."""

import torch


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def average(optimizer, k=0):
    return [optimizer.state[p][f"ema_{k}"] for group in optimizer.param_groups for p in group["params"]]


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(map(torch.equal, first, second))
