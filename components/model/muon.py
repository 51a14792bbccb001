"""Muon for matrices, AdamW for the rest, in one optimiser (Jordan et al. 2024)."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

WARM = 300  # steps until the momentum is in full: the first gradients are soon out of date

# Each quintic brings singular values from the interval that the one before leaves them in nearest to 1 (Amsel et al.
# 2025): from [0.003, 1] to [0.79, 1.21] in four steps. Their safety factor of 1.01 is in all but the last.
QUINTICS = (
    (8.1377, -22.7137, 16.3254),
    (3.9652, -2.8364, 0.5225),
    (3.4887, -2.5622, 0.5016),
    (2.5115, -1.8524, 0.4388),
)


def orthogonalise(g: Tensor) -> Tensor:
    """About the nearest semi-orthogonal matrix to each of g [n, rows, columns], by quintic Newton-Schulz steps."""
    wide = g.shape[-2] <= g.shape[-1]
    x = (g if wide else g.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in QUINTICS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(g.dtype)


class Muon(Optimizer):
    """`matrices` move by orthogonalised momentum at `matrix_lr`, the groups `others` by AdamW at their own "full" rate.

    Matrices of one shape are orthogonalised in one stack: many small products cost more in calls than in sums.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], matrix_lr: float, others: list[dict[str, Any]], beta2: float
    ) -> None:
        muon = {"params": list(matrices), "muon": True, "full": matrix_lr, "weight_decay": 0.0}
        groups = [muon, *({"muon": False, **group} for group in others)]
        super().__init__([{"lr": group["full"], **group} for group in groups], {"momentum": 0.95, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._muon if group["muon"] else self._adamw)(params, group)

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p].update(momentum=torch.zeros_like(p), step=torch.zeros(()))
        for p in params:
            self.state[p]["step"] += 1
        momentum = group["momentum"] - 0.1 * max(0.0, 1 - float(self.state[params[0]]["step"]) / WARM)
        momenta = [self.state[p]["momentum"] for p in params]
        grads = [p.grad for p in params if p.grad is not None]
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, momenta, momentum)  # Nesterov's look ahead
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        stacks: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            stacks[tuple(sorted(p.shape))].append(i)  # a tall matrix goes with the wide ones, on its side
        for same in stacks.values():
            wide = [ahead[i] if params[i].shape[0] <= params[i].shape[1] else ahead[i].T for i in same]
            for i, update in zip(same, orthogonalise(torch.stack(wide)), strict=True):
                rows, columns = params[i].shape
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                params[i].add_(update if rows <= columns else update.T, alpha=-rate)

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Loshchilov & Hutter 2019, with beta1 = 0.9 and epsilon 1e-8."""
        for p in params:
            if not self.state[p]:
                self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p), step=torch.zeros(()))
        grads = [p.grad for p in params if p.grad is not None]
        m, v = [self.state[p]["m"] for p in params], [self.state[p]["v"] for p in params]
        for p in params:
            self.state[p]["step"] += 1
        taken = int(self.state[params[0]]["step"])
        torch._foreach_lerp_(m, grads, 0.1)
        torch._foreach_mul_(v, group["beta2"])
        torch._foreach_addcmul_(v, grads, grads, 1 - group["beta2"])
        scale = torch._foreach_sqrt(v)
        torch._foreach_div_(scale, (1 - group["beta2"] ** taken) ** 0.5)
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(params, m, scale, -group["lr"] / (1 - 0.9**taken))
