"""The copy of one parameter and of its state."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import judge
from .judge import Interval
from .live import flat, live_pruned, live_streams


@dataclass
class Entry:
    """A parameter's copy. slack: how far each stream may be from the live one; empty when just copied."""

    p: Tensor
    moments: dict[str, Tensor]
    emas: dict[str, Tensor]
    counters: dict[str, Tensor]
    pruned: Tensor | None
    slack: dict[str, Tensor] = field(default_factory=dict)
    good: bool = True  # p was within bounds after the last step

    @classmethod
    def of(cls, opt, kind: type, p: Tensor) -> "Entry":
        live = live_streams(opt, kind, p)
        clones = {part: {k: v.clone() for k, v in streams.items()} for part, streams in live.items()}
        pruned = live_pruned(opt, p)
        return cls(flat(p).clone(), pruned=None if pruned is None else pruned.clone(), **clones)

    def streams(self) -> dict[str, Tensor]:
        """Everything of the parameter's shape, by name."""
        return {"p": self.p} | self.moments | self.emas

    def interval(self, stream: str) -> Interval:
        """A stream as it is, with its slack."""
        x = self.streams()[stream]
        slack = (
            self.slack[stream].double() if stream in self.slack else torch.zeros_like(x, dtype=torch.float64)
        )
        return Interval.around(x.double(), slack, x.dtype)

    def averaged(
        self, key: str, source: Interval, w: float, dtype: torch.dtype, wide: torch.dtype
    ) -> Interval:
        """An average after e.lerp_(p, w), or a copy of p at first; kept in dtype, computed in `wide`."""
        if key not in self.emas:
            return Interval.around(source.value.double(), source.slack(), dtype)
        old, p = self.interval(key), source.value.double()
        e = old.value.double().lerp(p, w)
        rounding = judge.ROUNDINGS * judge.roundoff(wide) * torch.maximum(old.value.double().abs(), p.abs())
        return Interval.around(e, (1 - w) * old.slack() + w * source.slack() + rounding, dtype)

    def renew(
        self, new: dict[str, Interval], emas: dict[str, Interval], counters: dict, pruned: Tensor
    ) -> None:
        """Take the results of a step as the copy."""
        self.p, self.counters, self.pruned = new["p"].value, counters, pruned
        self.moments = {key: interval.value for key, interval in new.items() if key != "p"}
        self.emas = {key: interval.value for key, interval in emas.items()}
        # Kept as float32 save for float64 streams; made a little larger, so that it never falls short.
        for key, interval in (new | emas).items():
            dtype = torch.promote_types(interval.value.dtype, torch.float32)
            self.slack[key] = (interval.slack() * 1.000001).to(dtype)

    def written_to(self, p: Tensor) -> bool:
        """Whether someone wrote to the live parameter since the last step."""
        return self.good and not bool(self.interval("p").allows(flat(p)).all())
