"""What each rank of test_pipeline.py runs: for each model steps of training by stages, a checkpoint, more steps and the
whole model; then the loop that the stage pretrain calls. Usage: ranks_pipeline.py TASK FOLDER."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from components.log import silent
from components.model.gpt import GPT, GPTConfig
from components.model.optim import Optim, schedule
from components.model.pipeline import Pipeline
from components.model.scratch import Saver
from components.train.loop import Training, fit
from components.train.pretrain import window_loss
from components.world import world


def windows(step: int, n: int = 8) -> list[np.ndarray]:
    return list(np.random.default_rng(step).integers(0, 40, (n, 17)))


def train(config: GPTConfig, optim: Optim, out: Path) -> None:
    torch.manual_seed(0)
    trained = Pipeline(GPT(config), optim, 8)
    losses, norms, held = [], [], []
    with Saver(out / "scratch", {"model": trained}) as saver:
        for step in range(12):
            if step == 6:
                saver.save(6, {})
            trained.set_rate(schedule(optim, step, 12))
            trained.learn(windows(step))
            losses.append(trained.sums["loss"] / 128)
            norms.append(trained.grad_norm)
            if step == 2:
                ids = torch.from_numpy(np.stack(windows(99, 3)))
                held.append(float(trained(ids[:, :-1], targets=ids[:, 1:])))
    parameters = sum(p.untyped_storage().nbytes() // 4 for p in trained.model.parameters())
    model = trained.finished()
    if world()[0] == 0:
        save_file({k: v.clone() for k, v in model.state_dict().items()}, out / "model.safetensors")
        (out / "said.json").write_text(json.dumps([losses, norms, held, parameters]))


def loop(config: GPTConfig, optim: Optim, out: Path, staged: bool) -> list[dict[str, float]]:
    """What `fit` logs when it is called as the stage pretrain does, broken off in step 6 and gone on from step 4."""
    recipe = optim.model_dump() | {"seed": 0, "steps": 8, "batch": 8, "eval_every": 2, "save_every": 4}
    cfg = Training.model_validate(recipe)
    rows: list[dict[str, float]] = []

    @torch.no_grad()
    def validate(model: GPT) -> dict[str, float]:
        return {"loss": float(window_loss(model, windows(99, 3))[0]) / 48}

    def broken(step: int) -> list[np.ndarray]:
        if step == 5:
            raise InterruptedError
        return windows(step)

    for batch_at in (broken, windows):
        torch.manual_seed(0)
        log = silent if batch_at is broken else lambda row, _: rows.append(row)
        with suppress(InterruptedError):
            fit(GPT(config), cfg, batch_at, window_loss, lambda w: len(w) - 1, validate, out, log, staged)
    return rows


def main(task: dict, out: Path) -> None:
    optim = Optim.model_validate(task["optim"])
    for name, config in task["configs"].items():
        (out / name).mkdir(exist_ok=True)
        train(GPTConfig.model_validate(config), optim, out / name)
    rows = loop(GPTConfig.model_validate(config), optim, out / "loop", staged=True)
    if world()[0] == 0:
        (out / "rows.json").write_text(json.dumps(rows))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
