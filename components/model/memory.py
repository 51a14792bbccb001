"""How much memory a training will take on the CPU, said before it runs.

Three things are added up.
- The process: what torch, DeepSpeed and the engine take before there is a model, measured (PROCESS).
- Tensors: `ledger` runs two steps on tensors without numbers and notes when each begins and ends. So weights,
  gradients, DeepSpeed's flat copy of them, moments, the average, what autograd keeps of each layer, the head's and the
  loss's memory, and what the optimiser holds as it moves the weights are the code's own.
- Holes: what the C library's heap cannot use again (heap.py).
"""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from components.model import fused, heap
from components.model.gpt import GPT, GPTConfig
from components.model.optim import Optim, optimiser

PROCESS = (
    493e6  # bytes, resident, of a process that trains a model of nothing: measured with DeepSpeed 0.19 and torch 2.13
)
DEEP = 24  # layers up to which all are tried
PIECES = 32  # into which the loops of fused.py are cut at most: a real one is smaller, and its numbers do not count

Events = list[tuple[int, int]]  # (a tensor's number, its bytes; negative where it ends)


class Ledger(TorchDispatchMode):
    """Inside, every storage that begins or ends is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.events: Events = []
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # a number without a value: Muon's count of steps
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            if isinstance(t, Tensor):
                self._note(t.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        place, size, number = storage._cdata, storage.nbytes(), len(self.events)
        if place in self._known:
            return

        def ends(_: object) -> None:
            del self._known[place]
            self.events.append((number, -size))

        self._known[place] = weakref.ref(storage, ends)
        self.events.append((number, size))


def ledger(
    config: GPTConfig, optim: Optim, micro: int, context: int, accumulation: int, recompute: bool, saves: bool = False
) -> tuple[Events, Events]:
    """What two steps of one rank without ZeRO take and give back: the model, and what comes after it.

    With `saves` the copy that a checkpoint is written from stands beside the second step.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), Ledger() as noted, _few_pieces(micro * context * max(config.mlp_width, config.vocab_size)):
        model = GPT(config)
        model.recompute = recompute
        made = len(noted.events)
        moved = optimiser(model.named_parameters(), optim)
        average = [p.detach().clone() for p in model.parameters()] if optim.ema is not None else []
        copied: list[Tensor] = []
        for _ in range(2):
            for _ in range(accumulation):
                _pass(model, micro, context, optim.precision == "bf16")
            _move(model, moved)
            if saves and not copied:
                moments = [t for state in moved.state.values() for t in state.values()]
                copied = [t.detach().clone() for t in (*model.parameters(), *moments, *average)]
        events = list(noted.events)
        del average, copied
    return events[:made], events[made:]


def _pass(model: GPT, rows: int, context: int, bf16: bool) -> None:
    ids = torch.zeros(rows, context + 1, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if model.config.head == "scalar":
            loss = model(ids[:, :-1]).sum()
        else:
            loss = model(ids[:, :-1], targets=ids[:, 1:]).sum()
    loss.backward()


def _move(model: nn.Module, moved: torch.optim.Optimizer) -> None:
    """As DeepSpeed does it: the gradients flat, for the ranks to add up, also where there is one."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.view(-1) for g in grads])
    del flat
    nn.utils.get_total_norm(grads)
    del grads
    moved.step()
    moved.zero_grad()


@contextmanager
def _few_pieces(numbers: int) -> Iterator[None]:
    real: Callable[[], int] = fused.piece
    fused.piece = lambda: max(real(), numbers // PIECES)
    try:
        yield
    finally:
        fused.piece = real


def peak(events: Events) -> int:
    """The most bytes that stand at once."""
    most = now = 0
    for _, n in events:
        now += n
        most = max(most, now)
    return most


def estimate(
    config: GPTConfig,
    optim: Optim,
    micro: int,
    context: int,
    *,
    accumulation: int = 1,
    recompute: bool = False,
    saves: bool = False,
) -> float:
    """Peak resident bytes of a training in micro-batches of `micro` rows of `context` tokens: one rank, no ZeRO.

    The layers of a deep model are alike: how much one adds is seen from fewer of them.
    """

    def of(layers: int) -> float:
        shape = config.model_copy(update={"layers": layers})
        return _resident(*ledger(shape, optim, micro, context, min(2, accumulation), recompute, saves))

    if config.layers <= DEEP:
        return PROCESS + of(config.layers)
    most, half = of(DEEP), of(DEEP // 2)
    return PROCESS + most + (most - half) / (DEEP - DEEP // 2) * (config.layers - DEEP)


def _resident(before: Events, after: Events) -> float:
    """The heap's size, in the largest of several layouts; where it cannot be tried, the tensors alone."""
    text = json.dumps([before, after])
    sizes = []
    for i in range(len(heap.RECORDS)):
        command = [sys.executable, "-S", "-E", heap.__file__, str(i)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:  # another C library, or no room
            return float(peak(before + after))
        sizes.append(int(done.stdout))
    return float(max(sizes))
