"""A tiny training to break. As a script it reads one JSON order a line, and runs each in a child of its own by fork, so
that torch and DeepSpeed are imported once for dozens of deaths; it answers with the child's wait status.

An order is {"scratch", "out", "fault": {kind: how}}; a training that ends well leaves its weights, its metrics and the
steps that it took in `out`.
"""

import json
import os
import random
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from components.log import Log
from components.model.gpt import GPT, GPTConfig
from components.train.loop import Training, fit

ROOT = Path(__file__).parents[2]
SHAPE = {
    **{"context": 16, "layers": 2, "width": 16, "heads": 2, "kv_heads": 2, "head_width": 8, "mlp_width": 32},
    **{"block": "pre", "norm": "layer", "norm_eps": 1e-5, "positions": "rotary", "rope_theta": 1e4},
    **{"rope_scaling": None, "activation": "gelu", "window": None, "qk_norm": False, "bias": "all", "tied": True},
    **{"logit_cap": None, "smear": False, "residual_init": "scaled", "vocab_size": 40, "head": "lm"},
}
RECIPE = Training(
    **{"lr": 1e-2, "matrix_lr": 0.02, "schedule": "wsd", "lr_floor": 0.1, "warmup": 2, "decay": 0.5},
    **{"weight_decay": 0.1, "beta2": 0.95, "clip": 1.0, "ema": 0.9, "precision": "fp32"},
    **{"seed": 3, "steps": 11, "batch": 4, "eval_every": 4, "save_every": 2},
)


def batch(step: int) -> list[Tensor]:
    return list(torch.randint(0, 40, (4, 17), generator=torch.Generator().manual_seed(step)))


def loss_of(model: torch.nn.Module, items: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.stack(items)
    noise = torch.rand(()) * 1e-3  # so that the random state has a say in the bytes
    logits = model(ids[:, :-1])
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return nats * (1 + noise), {"noise": noise}


def train(
    scratch: Path, log: Log = lambda row, step: None, cfg: Training = RECIPE, **shape: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train on from what lies in `scratch`: the weights and the metrics that it ends with."""
    scratch.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    random.seed(5)  # each child would draw these two anew, and their states' digits give each its own size of shard
    np.random.seed(5)
    model = GPT(GPTConfig(**SHAPE | shape))
    held = torch.stack(batch(99))

    @torch.no_grad()
    def validate(model: GPT) -> dict[str, float]:
        return {"loss": float(model(held[:, :-1]).logsumexp(-1).mean())}

    model, metrics = fit(model, cfg, batch, loss_of, lambda item: 16, validate, scratch, log)  # type: ignore[arg-type]
    return {k: v.detach().clone() for k, v in model.state_dict().items() if k != "head.weight"}, metrics


def arm(fault: dict[str, Any]) -> Log:
    """Prepare this process to break; the log to train with."""
    me = os.getpid()
    if "after" in fault:
        threading.Timer(fault["after"], os.kill, (me, signal.SIGKILL)).start()
    if "byte" in fault or "full" in fault:
        limit = fault.get("byte", fault.get("full"))
        # The kernel ends the process that writes behind this place of any file, or refuses the write.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if "byte" in fault else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if "event" in fault:
        left = [fault["event"]]

        def count(event: str, arguments: tuple) -> None:
            touched = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
            if touched and arguments and "step-" in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(me, signal.SIGKILL)

        sys.addaudithook(count)

    def log(row: Any, step: int) -> None:
        taken.append(step)
        if step == fault.get("step"):
            os.kill(me, fault["signal"])

    return log


taken: list[int] = []


def obey(order: dict[str, Any]) -> int:
    """The exit status of one training."""
    scratch, out = Path(order["scratch"]), Path(order["out"])
    log = arm(order["fault"])
    try:
        weights, metrics = train(scratch, log)
    except Exception as e:  # noqa: BLE001 - the test asks what it was
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        out.mkdir(parents=True)
        (out / "error.json").write_text(json.dumps([type(e).__name__, str(e)]))
        return getattr(e, "exit_code", 1)
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors")
    (out / "metrics.json").write_text(json.dumps(metrics, sort_keys=True))
    (out / "steps.json").write_text(json.dumps(taken))
    return 0


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401 - before the first fork, and what optimisers import at their first step
    import torch._dynamo  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 99
            try:
                status = obey(json.loads(line))
            finally:
                os._exit(status)
        print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
