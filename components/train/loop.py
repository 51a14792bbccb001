"""The loop that pretraining, SFT and the reward model share: batches in, checkpoints and a trained model out."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from components.artifact import ForjaError
from components.log import Log, lasting, silent
from components.model import engine
from components.model.engine import Engine, Optim
from components.model.gpt import GPT

# The sum of the loss over some items, and the sums of whatever else is measured on the way.
Loss = Callable[[torch.nn.Module, Sequence[Any]], tuple[Tensor, dict[str, Tensor]]]


class Training(Optim, frozen=True, extra="forbid"):
    """What every supervised training's recipe says beside its own keys."""

    seed: int
    steps: int = Field(ge=0)
    batch: int = Field(ge=1)
    eval_every: int = Field(ge=1)
    save_every: int = Field(ge=1)


class Diverged(ForjaError):
    """The loss is NaN or infinite: the weights are not worth keeping."""

    exit_code = 1


def fit(
    model: GPT,
    cfg: Training,
    batch_at: Callable[[int], Sequence[Any]],
    loss_of: Loss,
    count: Callable[[Any], int],
    validate: Callable[[GPT], dict[str, float]],
    scratch: Path,
    log: Log,
) -> dict[str, float]:
    """Train `model` in place for cfg.steps steps, and return the last step's metrics.

    The loss of a step is the sum of `loss_of` over the items of `batch_at(step)` divided by the sum of `count` over
    them, however the batch is cut into micro-batches and ranks. `validate` measures held-out rows. The run goes on
    from the newest whole checkpoint in `scratch`. Raises Diverged when the loss is no longer finite.
    """
    torch.manual_seed(cfg.seed)
    if cfg.steps == 0:
        return {}
    trained = Engine(model, cfg, cfg.batch)
    state = engine.resume(scratch, {"model": trained})
    first = state["step"] if state else 0
    log = log if engine.world()[0] == 0 else silent
    started, seen = time.perf_counter(), 0
    metrics: dict[str, float] = {}

    for step in range(first, cfg.steps):
        rate = engine.schedule(cfg, step, cfg.steps)
        trained.set_rate(rate)
        items = batch_at(step)
        total = sum(count(item) for item in items)
        sums: dict[str, float] = {}
        for micro in engine.split(items, trained.micro):
            loss, others = loss_of(trained.ds, micro)
            trained.step(loss, total)
            for name, value in {"loss": loss, **others}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        if not sums["loss"] < float("inf"):
            raise Diverged(f"step {step}: the loss is {sums['loss']}; lower lr (now {cfg.lr}) or raise warmup")

        done = step + 1
        seen += total
        metrics = {name: value / total for name, value in sums.items()}
        metrics |= {"lr": cfg.lr * rate, "grad_norm": trained.grad_norm, "progress": done / cfg.steps}
        metrics["perf/items_per_s"] = seen / (time.perf_counter() - started)
        if done % cfg.eval_every == 0 or done == cfg.steps:
            metrics |= {f"val_{k}": v for k, v in validate(model).items()}
        log(metrics, done)
        if done % cfg.save_every == 0 and done < cfg.steps:
            engine.save(scratch, done, {"model": trained}, {})
    return lasting(metrics)
