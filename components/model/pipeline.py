"""Pretraining cut by depth: each rank holds some of the blocks, and micro-batches flow through (Huang et al. 2019).

FORJA_PIPELINE=2 asks for two stages; the ranks are a multiple of it, and what is left over takes other rows.
DeepSpeed's schedule moves activations and gradients. An embedding that is also the head lies on the first and the last
stage, which add up its gradients. Checkpoints are those of any other training: a run may go on without stages.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.artifact import ForjaError
from components.model.engine import Engine, Place, device
from components.model.engine import _deepspeed as start_deepspeed
from components.model.fused import keep_freed_memory
from components.model.gpt import GPT, GPTConfig
from components.model.optim import Optim, optimiser
from components.model.scratch import Piece
from components.world import world


def stages() -> int:
    """FORJA_PIPELINE, 1 where it is not set. Raises ForjaError where the ranks are no multiple of it."""
    text, ranks = os.environ.get("FORJA_PIPELINE") or "1", world()[1]
    if not text.isdigit() or int(text) < 1:
        raise ForjaError(f"FORJA_PIPELINE={text}: is no number of stages; set it to 1 or more")
    if ranks % int(text):
        raise ForjaError(f"FORJA_PIPELINE={text} on {ranks} rank(s): they must be a multiple; set FORJA_RANKS={text}")
    return int(text)


def _refuse(config: GPTConfig, optim: Optim) -> None:
    """Raises ForjaError for what stages cannot do."""
    asked = f"FORJA_PIPELINE={stages()}"
    if stages() > config.layers:
        raise ForjaError(f"{asked}: the model has {config.layers} blocks; ask for that many stages at most")
    if optim.ema is not None:
        raise ForjaError(f"{asked}: keeps no average of the weights; set ema=null")
    for other in ("FORJA_ZERO", "FORJA_OFFLOAD_OPTIMIZER", "FORJA_OFFLOAD_PARAMS", "FORJA_COMPILE"):
        if os.environ.get(other, "0") not in ("", "0"):
            raise ForjaError(f"{asked}: not together with {other}; leave one of them out")


class Part(nn.Module):
    """A module of the model, and how it is called on what the part before it gives."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self._call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self.module, x)


class Outside(nn.Module):
    """What stands between the embedding and the blocks: learned positions and the smear."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.wpe, self.smear = model.wpe, model.smear

    def forward(self, x: Tensor) -> Tensor:
        if self.smear is not None:
            before = F.pad(x[:, :-1], (0, 0, 1, 0))  # a text's first token has none before
            x = x + before * self.smear
        return x if self.wpe is None else x + self.wpe.weight[: x.shape[1]]


def parts(model: GPT) -> list[tuple[nn.Module, Callable[[Any, Tensor], Tensor]]]:
    """The model between its embedding and its head, one call after another."""

    def block(i: int) -> Callable[[Any, Tensor], Tensor]:
        def call(module: nn.Module, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1], device=x.device)
            y: Tensor = module(x, positions, model.rope(positions), None, None, i)
            return y

        return call

    plain: Callable[[Any, Tensor], Tensor] = lambda module, x: module(x)  # noqa: E731
    inner = [(b, block(i)) for i, b in enumerate(model.blocks)]
    return [(Outside(model), plain), *inner, (model.norm, plain)]


def divide(model: GPT, n: int) -> Any:
    """DeepSpeed's module of this rank's part of the model, cut so that the stages hold about as many parameters."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    class Ready(LayerSpec):
        """A layer that is there already."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__(nn.Module)
            self.ready = module

        def build(self, log: bool = False) -> nn.Module:
            return self.ready

    class Tied(TiedLayerSpec):
        def build(self, log: bool = False) -> nn.Module:
            return model.wte

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    cap = model.config.logit_cap
    capped = lambda y: y if cap is None else cap * torch.tanh(y.float() / cap)  # noqa: E731
    layers = [Ready(Part(module, call)) for module, call in parts(model)]
    if model.config.tied:
        first: Any = Tied("wte", nn.Embedding)
        last: Any = Tied("wte", nn.Embedding, forward_fn=lambda wte, x: capped(F.linear(x, wte.weight)))
    else:
        first, last = Ready(model.wte), Ready(Part(model.head, lambda head, x: capped(head(x))))
    return PipelineModule(
        layers=[first, *layers, last],
        num_stages=n,
        loss_fn=loss,
        partition_method="parameters",
        activation_checkpoint_interval=int(os.environ.get("FORJA_RECOMPUTE") == "1"),
        dynamic_shape=True,  # held-out windows come in other numbers
    )


class Pipeline(Engine):
    """An Engine over stages, for windows of tokens."""

    def __init__(self, model: GPT, optim: Optim, batch: int) -> None:
        keep_freed_memory()
        _refuse(model.config, optim)
        deepspeed = start_deepspeed()
        n, self.columns = stages(), world()[1] // stages()
        self.optim, self.model, self.zero = optim, model.to(device()), 0
        self.micro = int(os.environ.get("FORJA_MICRO_BATCH") or max(1, batch // (self.columns * 2 * n)))
        if batch % (self.micro * self.columns):
            raise ForjaError(f"FORJA_MICRO_BATCH={self.micro}: does not divide the batch of {batch}; choose a divisor")
        with redirect_stdout(StringIO()):  # DeepSpeed prints how it cuts
            module = divide(model, n)
        here = {id(p) for p in module.parameters()}
        self.mine = {name: p for name, p in model.named_parameters() if id(p) in here}
        for p in model.parameters():
            if id(p) not in here:  # another stage's: the shape alone is kept
                p.data = p.data.new_empty(()).expand(p.shape)
        self.base = optimiser(self.mine.items(), optim)
        self.ds, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.base,
            config={
                "train_batch_size": batch,
                "train_micro_batch_size_per_gpu": self.micro,
                "gradient_clipping": 0.0,  # see _guarded; not told, DeepSpeed clips at 1
                "torch_autocast": {
                    "enabled": optim.precision == "bf16",
                    "dtype": "bfloat16",
                    "lower_precision_safe_modules": [],
                },
                "pipeline": {"use_reentrant": False},
                "steps_per_print": 1 << 60,
            },
        )
        self._move, self.base.step = self.base.step, self._guarded  # type: ignore[method-assign]
        self.grad_norm, self.taken, self.skipped = 0.0, 0, False
        self.sums, self._average = {}, {}

    def learn(self, windows: Sequence[np.ndarray]) -> None:
        """Take one step on a global batch of windows [context + 1]."""
        blocks = [windows[i : i + self.micro] for i in range(0, len(windows), self.micro)]
        own = blocks[self.ds.grid.get_data_parallel_rank() :: self.columns]
        ids = (torch.from_numpy(np.stack(block)).to(device()) for block in own)
        with warnings.catch_warnings():  # of activations that it sends without a gradient: that goes back by itself
            warnings.filterwarnings("ignore", message="c10d::broadcast_")
            loss = float(self.ds.train_batch((x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in ids))
        self.sums = {"loss": loss * sum(len(w) - 1 for w in windows)}
        self.taken += not self.skipped

    def _guarded(self, *arguments: Any, **keywords: Any) -> Any:
        """The optimiser's step, on gradients clipped by their norm over all stages.

        DeepSpeed's own clipping knows the norm of the first stage alone.
        """
        own = [p.grad for p in self._owned().values() if p.grad is not None]
        squares = torch.stack([g.float().square().sum() for g in own]).sum().view(1)
        torch.distributed.all_reduce(squares, group=self.ds.grid.get_pipe_parallel_group())
        self.grad_norm = math.sqrt(float(squares))
        self.skipped = not math.isfinite(self.grad_norm)
        for p in self.mine.values():
            if p.grad is not None:
                p.grad.mul_(min(1.0, self.optim.clip / (self.grad_norm + 1e-6)))
        return None if self.skipped else self._move(*arguments, **keywords)

    def _owned(self) -> dict[str, nn.Parameter]:
        """This stage's parameters, without an embedding that an earlier stage has too."""
        return {n: p for n, p in self.mine.items() if not getattr(p, "ds_pipe_replicated", False)}

    def places(self) -> dict[str, Place]:
        return {n: Place(p, 0, 0, p.numel()) for n, p in self.mine.items()}

    def pieces(self) -> Iterator[Piece]:
        yield Piece("taken", 0, torch.tensor([self.taken]))
        for name, p in self._owned().items() if self.ds.grid.get_data_parallel_rank() == 0 else ():
            yield Piece(f"weight/{name}", 0, p.detach().view(-1))
            for key, value in self.base.state.get(p, {}).items():
                yield Piece(f"{key}/{name}", 0, value.detach().view(-1))

    @torch.no_grad()
    def __call__(self, ids: Tensor, *, targets: Tensor) -> Tensor:
        """The nats of `targets`, summed: where the whole model is called for them, in its place."""
        mean = self.ds.eval_batch(iter([(ids.contiguous(), targets.contiguous())]), num_micro_batches=1)
        return torch.as_tensor(mean) * targets.numel()

    @torch.no_grad()
    def finished(self) -> GPT:
        """The trained model, whole on every rank. The engine is done with."""
        owned = self._owned() if self.ds.grid.get_data_parallel_rank() == 0 else {}
        for name, p in self.model.named_parameters():
            numbers = owned[name].detach().clone() if name in owned else torch.zeros(p.shape, device=device())
            torch.distributed.all_reduce(numbers)
            p.data = numbers
        whole: GPT = self.model
        return whole
