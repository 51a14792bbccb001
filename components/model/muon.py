"""Muon for matrices, AdamW for the rest, in one optimiser (Jordan et al. 2024)."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """About the nearest semi-orthogonal matrix to each of g [n, rows, columns], by a quintic Newton-Schulz iteration.

    The singular values end in [0.7, 1.2], which serves an update as well as exactly 1 (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[-2] <= g.shape[-1]
    x = (g if wide else g.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
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
            if group["muon"]:
                self._muon(params, group)
            elif params:
                self._adamw(params, group)

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        stacks: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            stacks[p.shape].append(p)
        for shape, same in stacks.items():
            for p in same:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in same]
            grads = [p.grad for p in same if p.grad is not None]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            ahead = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov's look ahead
            updates = orthogonalise(torch.stack(list(ahead)))
            rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, list(updates.unbind()), alpha=-rate)

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
