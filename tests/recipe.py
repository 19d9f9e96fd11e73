"""One step as a user would write it with torch: separate passes around a fused torch optimizer.

Independent of fuseopt's own reference, and exact: in fp32 every pass rounds as the contract says, so its
bits are those that one pass over memory must give.
"""

import torch
from cases import Rule, all_params
from torch import Tensor


def fma(a: float, b: Tensor, c: Tensor) -> Tensor:
    """a*b + c in fp32, rounded once (the product of two fp32 numbers is exact in fp64)."""
    return (torch.tensor(a, dtype=torch.float32).double() * b.double() + c.double()).float()


class Recipe:
    """A rule with every stage, for fp32 parameters and sizes that are multiples of torch's vector."""

    def __init__(self, rule: Rule, params, *, scale=1.0, keep=None, mode="freeze", max_grad_norm=None, l1=0.0,
                 threshold=0.0, prune=None, keep_moments=False, ema=()):
        options = dict(rule.options)
        self.lr, self.l2, self.l1 = options["lr"], options.pop("weight_decay"), l1
        self.sign = -1.0 if options.pop("maximize", False) else 1.0
        self.decoupled = options.pop("decoupled_weight_decay", rule.cls.__name__ == "AdamW")
        self.torchs = getattr(torch.optim, rule.cls.__name__)(params, **options, weight_decay=0.0, fused=True)
        self.params = all_params(self.torchs)
        self.scale, self.keep, self.mode, self.max_grad_norm = scale, keep, mode, max_grad_norm
        self.threshold, self.prune, self.keep_moments, self.ema = threshold, prune, keep_moments, ema
        self.pruned = [torch.zeros(p.shape, dtype=torch.bool) for p in self.params]
        self.averages = [[] for _ in ema]
        self.t = 0

    def kept(self, k: int) -> Tensor:
        return self.keep[k] if self.keep else torch.ones(self.params[k].shape, dtype=torch.bool)

    def moments(self, p: Tensor) -> list[Tensor]:
        return [v for key, v in self.torchs.state[p].items() if key != "step" and v is not None]

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        self.t += 1
        p_before = [p.clone() for p in self.params]
        m_before = [[m.clone() for m in self.moments(p)] for p in self.params]
        gs = [g * torch.tensor(1.0 / self.scale) * self.sign for g in gradients]
        gs = [torch.where(self.kept(k), g, 0.0) for k, g in enumerate(gs)]
        if self.max_grad_norm is not None:
            free = [torch.where(pruned, 0.0, g).double() for g, pruned in zip(gs, self.pruned, strict=True)]
            norm = torch.stack([g.square().sum() for g in free]).sum().sqrt()
            gs = [g * torch.tensor(min(1.0, self.max_grad_norm / (norm.item() + 1e-6))) for g in gs]
        for k, (p, g) in enumerate(zip(self.params, gs, strict=True)):
            if self.decoupled:
                p.mul_(1 - self.lr * self.l2)
            else:
                gs[k] = fma(self.l1, p.sign(), fma(self.l2, p, g))
            p.grad = gs[k]
        self.torchs.step()
        for k, p in enumerate(self.params):
            if self.decoupled:
                p.copy_(torch.copysign((p.abs() - torch.tensor(self.lr * self.l1)).clamp(min=0), p))
            frozen = ~self.kept(k) if self.mode == "freeze" else torch.zeros_like(self.kept(k))
            self.pruned[k] |= (p.abs() < self.threshold) & ~frozen
            self.finish(k, p, frozen, p_before[k], m_before[k])
        if self.prune is not None and self.t in self.prune:
            self.select(self.prune[self.t])
        self.average()

    def finish(self, k, p, frozen, p_before, m_before) -> None:
        for j, m in enumerate(self.moments(p)):
            old = m_before[j] if m_before else torch.zeros_like(m)
            m.copy_(torch.where(frozen, old, m))
            if not self.keep_moments:
                m.masked_fill_(self.pruned[k], 0.0)
        p.copy_(torch.where(frozen, p_before, p))
        p.masked_fill_(self.pruned[k], 0.0)

    def select(self, sparsity: float) -> None:
        """The smallest to round(sparsity * n), over all parameters with two dimensions or more."""
        wide = [k for k, p in enumerate(self.params) if p.dim() >= 2]
        size = torch.cat([self.params[k].abs().flatten() for k in wide])
        gone = torch.cat([self.pruned[k].flatten() for k in wide])
        held = torch.cat([~self.kept(k).flatten() & (self.mode == "freeze") for k in wide])
        order = sorted((i for i in range(len(size)) if not gone[i] and not held[i]), key=lambda i: (float(size[i]), i))
        gone[torch.tensor(order[: max(0, round(sparsity * len(size)) - int(gone.sum()))], dtype=torch.long)] = True
        for k, part in zip(wide, gone.split([self.params[k].numel() for k in wide]), strict=True):
            self.pruned[k] = part.reshape(self.params[k].shape)
            self.params[k].masked_fill_(self.pruned[k], 0.0)
            if not self.keep_moments:
                for m in self.moments(self.params[k]):
                    m.masked_fill_(self.pruned[k], 0.0)

    def average(self) -> None:
        for j, decay in enumerate(self.ema):
            if self.t == 1:
                self.averages[j] = [p.clone() for p in self.params]
                continue
            d = decay(self.t) if callable(decay) else decay
            for k, p in enumerate(self.params):
                e = self.averages[j][k]
                e.copy_(torch.where(self.pruned[k], 0.0, fma(1 - d, p - e, e)))
