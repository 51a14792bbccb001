"""Muon for matrices, AdamW for the rest, in one optimiser (Jordan et al. 2024)."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from components.model.checkpoint import default_device as device
from components.world import world

WARM = 300  # steps until the momentum is in full: the first gradients are soon out of date
PRODUCTS = torch.bfloat16  # what the Newton-Schulz steps are taken in
AT_ONCE = 1 << 26  # numbers of the matrices that are put together at a time, where ranks hold pieces of them

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
    x = (g if wide else g.mT).to(PRODUCTS)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in QUINTICS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(g.dtype)


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each of `matrices` orthogonalised, those of one shape in one stack: many small products cost more in calls."""
    stacks: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        stacks[tuple(sorted(matrix.shape))].append(i)  # a tall matrix goes with the wide ones, on its side
    out = list(matrices)
    for same in stacks.values():
        wide = [matrices[i] if matrices[i].shape[0] <= matrices[i].shape[1] else matrices[i].T for i in same]
        for i, update in zip(same, orthogonalise(torch.stack(wide)), strict=True):
            out[i] = update if matrices[i].shape[0] <= matrices[i].shape[1] else update.T
    return out


def stretch(matrix: Tensor) -> float:
    """By how much faster a tall matrix moves."""
    rows, columns = matrix.shape
    return float(max(1.0, rows / columns) ** 0.5)


class Cut(NamedTuple):
    """A matrix, and the numbers of it that this rank holds: `length` of them, flattened from `start` on, which lie in a
    flat tensor from `at` on. The length may be 0."""

    rows: int
    columns: int
    at: int
    start: int
    length: int


def gathered(flat: Tensor, cuts: Sequence[Cut]) -> Iterator[tuple[Cut, Tensor]]:
    """Those matrices of which this rank holds numbers, whole: every rank's pieces of them, from its own `flat`.

    All ranks must come here, with the same matrices in the same order.
    """
    sizes = [cut.rows * cut.columns for cut in cuts]
    whole = torch.zeros(sum(sizes), dtype=flat.dtype, device=device())
    parts = whole.split(sizes)
    for cut, part in zip(cuts, parts, strict=True):
        part[cut.start : cut.start + cut.length] = flat[cut.at : cut.at + cut.length]
    if world()[1] > 1:
        torch.distributed.all_reduce(whole)
    yield from ((cut, part.view(cut.rows, cut.columns)) for cut, part in zip(cuts, parts, strict=True) if cut.length)


def by_size(cuts: Sequence[Cut]) -> Iterator[list[Cut]]:
    """In order, as many at a time as have AT_ONCE numbers together, or one."""
    some: list[Cut] = []
    for cut in cuts:
        if some and sum(c.rows * c.columns for c in (*some, cut)) > AT_ONCE:
            yield some
            some = []
        some.append(cut)
    yield some


class Muon(Optimizer):
    """`matrices` move by orthogonalised momentum at `matrix_lr`, the groups `others` by AdamW at their own "full" rate.

    Where ZeRO has put pieces of the matrices into flat tensors and steps with those, `cuts` says by a tensor's id what
    lies in it. Momenta are then kept as flat, and each rank orthogonalises the matrices that it holds a piece of.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], matrix_lr: float, others: list[dict[str, Any]], beta2: float
    ) -> None:
        muon = {"params": list(matrices), "muon": True, "full": matrix_lr, "weight_decay": 0.0}
        groups = [muon, *({"muon": False, **group} for group in others)]
        super().__init__([{"lr": group["full"], **group} for group in groups], {"momentum": 0.95, "beta2": beta2})
        self.cuts: dict[int, list[Cut]] = {}

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
        if self.cuts:
            for p, look in zip(params, ahead, strict=True):
                self._move_pieces(p, look, group["lr"])
            return
        for p, update in zip(params, orthogonal(ahead), strict=True):
            p.add_(update, alpha=-group["lr"] * stretch(update))

    def _move_pieces(self, flat: Tensor, look: Tensor, lr: float) -> None:
        for some in by_size(self.cuts[id(flat)]):
            mine = list(gathered(look, some))
            for (cut, _), update in zip(mine, orthogonal([matrix for _, matrix in mine]), strict=True):
                piece = update.reshape(-1)[cut.start : cut.start + cut.length]
                flat[cut.at : cut.at + cut.length].add_(piece.to(flat.device), alpha=-lr * stretch(update))

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
