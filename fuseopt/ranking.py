"""The largest of some scores, exactly, by radix select: processes agree by adding up histograms, never scores."""

import torch
from torch import Tensor

from .distributed import Parts
from .select import kth_smallest, quotas


def keys(score: Tensor) -> Tensor:
    """Whole numbers of the score's size in the reverse order of the scores, as a vector; NaN comes last."""
    falling = torch.where(score.isnan(), torch.inf, -score) + 0.0  # and -0 is equal to +0
    whole = torch.int64 if score.dtype == torch.float64 else torch.int32
    as_whole = falling.contiguous().view(whole).reshape(-1)
    return torch.where(as_whole < 0, as_whole ^ torch.iinfo(whole).max, as_whole)


def digits(key: Tensor, prefix: int, shift: int, width: int) -> Tensor:
    """The next `width` bits of the keys that begin with `prefix`; what kth_smallest counts.

    Keys are signed, so their first digit, of one bit, is whether they are not negative.
    """
    bits = torch.iinfo(key.dtype).bits
    if shift == bits - 1:
        return (key >= 0).long()
    begin = (key >> (shift + width)) + (1 << (bits - 1 - shift - width))
    return (key[begin == prefix] >> shift).long() & ((1 << width) - 1)


@torch.no_grad()
def largest(params: list[Tensor], scores: list[Tensor], share: float, sharded: bool) -> list[Tensor]:
    """Boolean tensors like `scores`, True for the round(share * n) largest of all n; the earlier one of equals.

    scores: fp32 or fp64, of the entries of `params` on this process. sharded: see distributed.Parts.
    """
    parts = Parts(params, sharded)
    wide = [torch.tensor([score.numel(), score.dtype == torch.float64]) for score in scores]
    n, any_wide = parts.total(lambda members: sum((wide[k] for k in members), torch.zeros(2).long())).tolist()
    count = round(share * n)
    if count in (0, n):
        return [torch.full_like(score, bool(count), dtype=torch.bool) for score in scores]
    own = [keys(score.double() if any_wide else score) for score in scores]

    def histogram(members: list[int], prefix: int, shift: int, width: int) -> Tensor:
        found = [torch.bincount(digits(own[k], prefix, shift, width), minlength=1 << width).cpu() for k in members]
        return sum(found, torch.zeros(1 << width, dtype=torch.int64))

    widths = [1, 16, 16, 16, 15] if any_wide else [1, 16, 15]
    last, rank, _ = kth_smallest(count, widths, lambda *digit: parts.total(lambda m: histogram(m, *digit)))
    last -= 1 << (sum(widths) - 1)
    tied = [(key == last).reshape(score.shape) for key, score in zip(own, scores, strict=True)]
    ties = torch.tensor([int(equal.sum()) for equal in tied], dtype=torch.int64)
    of_each = quotas(parts, ties, rank, dict(zip(params, tied, strict=True)).__getitem__).tolist()
    return [
        (key < last).reshape(equal.shape) | equal & (equal.flatten().cumsum(0) <= quota).reshape(equal.shape)
        for key, equal, quota in zip(own, tied, of_each, strict=True)
    ]
