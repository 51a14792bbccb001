"""The loop that pretraining, SFT and the reward model share: batches in, checkpoints and a trained model out."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from components.artifact import ForjaError
from components.log import Log, lasting, silent
from components.model.engine import Engine
from components.model.gpt import GPT
from components.model.optim import Optim, schedule
from components.model.pipeline import Pipeline
from components.model.ranks import interrupted, split, stoppable
from components.model.scratch import Saved, Saver
from components.train.best import Best
from components.world import world

# The sum of the loss over some items, and the sums of whatever else is measured on the way.
Loss = Callable[[torch.nn.Module, Sequence[Any]], tuple[Tensor, dict[str, Tensor]]]
PATIENCE = 10  # steps in a row that may be left out because they are not finite


class Training(Optim, frozen=True, extra="forbid"):
    """What every supervised training's recipe says beside its own keys."""

    seed: int
    steps: int = Field(ge=0)
    batch: int = Field(ge=1)
    eval_every: int = Field(ge=1)
    save_every: int = Field(ge=1)


class Keeping(Training, frozen=True, extra="forbid"):
    """A training that may end with the weights of another step than the last."""

    keep: Literal["best", "last"]  # the step whose weights are kept: that which did best on held-out rows, or the last

    @field_validator("keep")
    @classmethod
    def _no_average_of_it(cls, keep: str, info: ValidationInfo) -> str:
        if keep == "best" and info.data.get("ema") is not None:
            raise ValueError("best, and ema keeps an average of all steps; set keep to last, or ema to null")
        return keep


class FineTuning(Keeping, frozen=True, extra="forbid"):
    """What SFT and the reward model, which learn from conversations, have in common beside."""

    long: Literal["cut", "drop"]  # what becomes of conversations longer than the context


class Diverged(ForjaError):
    """Loss or gradient is NaN or infinite for too long: the training leads nowhere."""

    exit_code = 1


class Skips:
    """Counts the steps that were left out because their loss or gradient was not finite."""

    def __init__(self, total: int = 0, running: int = 0) -> None:
        self.total, self.running = total, running

    def note(self, skipped: bool, step: int, what: str, lr: float) -> None:
        """Count `step`. Raises Diverged when more than PATIENCE in a row were left out."""
        self.total += skipped
        self.running = self.running + 1 if skipped else 0
        if self.running > PATIENCE:
            self.give_up(step, what, lr)

    def give_up(self, step: int, what: str, lr: float) -> None:
        raise Diverged(
            f"step {step}: {what}, and {self.running} steps in a row were left out for that; "
            f"lower lr (now {lr}), raise warmup, or look at the data of these steps"
        )


def finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def fit(
    model: GPT,
    cfg: Training,
    batch_at: Callable[[int], Sequence[Any]],
    loss_of: Loss,
    count: Callable[[Any], int],
    validate: Callable[[Any], dict[str, float]],
    scratch: Path,
    log: Log,
    staged: bool = False,
    keep: Literal["last", "best"] = "last",
) -> tuple[GPT, dict[str, float]]:
    """Train `model` for cfg.steps steps; the trained one (mostly the same object) and the last step's metrics.

    The loss of a step is the sum of `loss_of` over the items of `batch_at(step)` divided by the sum of `count` over
    them, however the batch is cut into micro-batches and ranks. `validate` measures held-out rows. The run goes on
    from the newest whole checkpoint in `scratch`. `staged`: the items are windows of tokens, the loss that of the next
    one, and the model is cut into stages (pipeline.py). `keep`: the weights of the last step, or of the one with the
    lowest held-out `loss`. A step that is not finite is left out and counted. Raises Diverged when too many are, and
    Interrupted when a signal asked to stop.
    """
    torch.manual_seed(cfg.seed)
    if cfg.steps == 0:
        return model, {}
    trained = (Pipeline if staged else Engine)(model, cfg, cfg.batch)
    log = log if world()[0] == 0 else silent
    best = Best(model) if keep == "best" else None
    saved: dict[str, Saved] = {"model": trained} | ({} if best is None else {"best": best})
    with stoppable() as asked, Saver(scratch, saved) as saver:
        state = saver.resume() or {"step": 0, "skipped": [0, 0], "metrics": {}}
        skips, metrics = Skips(*state["skipped"]), state["metrics"]
        started, seen = time.perf_counter(), 0

        for step in range(state["step"], cfg.steps):
            rate = schedule(cfg, step, cfg.steps)
            trained.set_rate(rate)
            items = batch_at(step)
            total = sum(count(item) for item in items)
            if isinstance(trained, Pipeline):
                trained.learn(items)
            for micro in split(items, trained.micro) if not staged else ():
                loss, others = loss_of(trained.ds, micro)
                trained.step(loss, total, others)
            said = f"the loss is {trained.sums['loss'] / total}, the gradient's norm {trained.grad_norm}"
            skips.note(trained.skipped, step, said, cfg.lr)

            done = step + 1
            seen += total
            row = {"lr": cfg.lr * rate, "progress": done / cfg.steps}
            row["perf/items_per_s"] = seen / (time.perf_counter() - started)
            if trained.skipped:
                row["skipped"] = float(skips.total)
            else:
                row |= {name: value / total for name, value in trained.sums.items()}
                row["grad_norm"] = trained.grad_norm
            if done == cfg.steps:
                if skips.running == cfg.steps:
                    skips.give_up(step, said, cfg.lr)
                model = trained.finished()
            if done % cfg.eval_every == 0 or done == cfg.steps:
                row |= {f"val_{k}": v for k, v in validate(trained if staged and done < cfg.steps else model).items()}
                if best is not None:
                    best.note(row["val_loss"], done)
            log(row, done)
            metrics = {**metrics, **lasting(row)}
            signal = asked()
            if done < cfg.steps and (done % cfg.save_every == 0 or signal):
                saver.save(done, {"skipped": [skips.total, skips.running], "metrics": finite(metrics)})
            if done < cfg.steps and signal:
                saver.join()
                raise interrupted(signal, done, cfg.steps)
    if best is not None:
        best.put_back()
        metrics = {**metrics, "best_step": float(best.step)}
    return model, metrics | {"skipped": float(skips.total)}
