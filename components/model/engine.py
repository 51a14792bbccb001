"""Training moved by DeepSpeed: the only file that knows it.

What a recipe says (learning rate, batch, precision) is `Optim`. What the machine has is not identity and comes from the
environment: FORJA_DEVICE (cpu, cuda), FORJA_MICRO_BATCH, FORJA_ZERO (stage 0 to 3), and a launcher's RANK and
WORLD_SIZE. A checkpoint is a folder sealed with a record; the newest whole one is where a run goes on.
"""

import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from components.artifact import ForjaError, building, read_record, to_json, write_record

KEPT = 2  # checkpoints on disk: the newest, and the one before it in case the newest is damaged
Item = TypeVar("Item")
logger = logging.getLogger("forja")


class Optim(BaseModel, frozen=True, extra="forbid"):
    """AdamW with a linear warmup and a cosine decay to `lr_floor` of its peak."""

    lr: float = Field(gt=0)
    lr_floor: float = Field(ge=0, le=1)
    warmup: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    beta2: float = Field(gt=0, lt=1)
    clip: float = Field(gt=0)
    precision: Literal["fp32", "bf16"]


def device() -> torch.device:
    wanted = os.environ.get("FORJA_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted, int(os.environ.get("LOCAL_RANK", "0")) if wanted == "cuda" else None)


def world() -> tuple[int, int]:
    """(rank, ranks)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of `step` (from 0) of `steps`: linear warmup, then half a cosine (Loshchilov & Hutter 2017)."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    done = (step - optim.warmup) / max(1, steps - optim.warmup)
    return optim.lr * (optim.lr_floor + (1 - optim.lr_floor) * 0.5 * (1 + math.cos(math.pi * done)))


def micro_batch(batch: int) -> int:
    """Rows of one forward pass on one rank. Raises ForjaError where they do not divide the recipe's batch exactly."""
    ranks = world()[1]
    size = int(os.environ.get("FORJA_MICRO_BATCH") or max(1, batch // ranks))
    if batch % (size * ranks):
        raise ForjaError(
            f"FORJA_MICRO_BATCH={size} on {ranks} rank(s): does not divide the batch of {batch}; choose a divisor"
        )
    return size


def split(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """This rank's micro-batches of a global batch: rank r takes every ranks-th block, in order."""
    rank, ranks = world()
    blocks = [items[i : i + size] for i in range(0, len(items), size)]
    return blocks[rank::ranks]


class Engine:
    """A model with its optimiser, as DeepSpeed drives them."""

    def __init__(self, model: nn.Module, optim: Optim, batch: int) -> None:
        deepspeed = _deepspeed()
        self.optim, self.micro = optim, micro_batch(batch)
        # Vectors (norms, biases) are not decayed: decay is a prior on matrices.
        matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(groups, lr=optim.lr, betas=(0.9, optim.beta2), eps=1e-8, fused=True)
        self.ds, *_ = deepspeed.initialize(
            model=model.to(device()),
            optimizer=adamw,
            config={
                "train_batch_size": batch,
                "train_micro_batch_size_per_gpu": self.micro,
                "gradient_clipping": optim.clip,
                "bf16": {"enabled": optim.precision == "bf16"},
                "zero_optimization": {"stage": int(os.environ.get("FORJA_ZERO", "0"))},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 1 << 60,
            },
        )
        self.model: nn.Module = self.ds.module
        self._norm = 0.0

    def set_lr(self, lr: float) -> None:
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr

    def step(self, loss_sum: Tensor, total: float) -> None:
        """Take in one micro-batch; the weights move with the last one of the global batch.

        `loss_sum` is the micro-batch's sum, `total` the count that the global batch divides by.

        DeepSpeed averages over micro-batches and ranks; their number is multiplied back so that the gradient is that
        of sum / total however the batch is cut.
        """
        accumulation = self.ds.gradient_accumulation_steps()
        self.ds.backward(loss_sum * (accumulation * world()[1] / total))
        if self.optim.precision == "fp32" and self.ds.is_gradient_accumulation_boundary():
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._norm = float(nn.utils.get_total_norm(grads))  # DeepSpeed keeps it in its bf16 path only
        self.ds.step()

    def grad_norm(self) -> float:
        """The global gradient norm before clipping, of the last step taken."""
        return self._norm if self.optim.precision == "fp32" else float(self.ds.get_global_grad_norm())

    def float_state(self) -> dict[str, Tensor]:
        """The weights in float32: the optimiser's own copy where training runs in bf16."""
        if self.optim.precision == "fp32":
            return {k: v.detach().float().clone() for k, v in self.model.state_dict().items()}
        from deepspeed.utils import safe_get_full_fp32_param

        state = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            full = safe_get_full_fp32_param(p)
            state[name] = (full if full is not None else p.detach().float()).clone().view(p.shape)
        return state


def _deepspeed() -> Any:
    """DeepSpeed, imported late (it takes seconds), quietly, with a group of one where no launcher made one."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DS_ACCELERATOR", device().type)
    import deepspeed
    from deepspeed.utils import logger as ds_logger

    ds_logger.setLevel(logging.ERROR)
    # Its shared-memory collectives are compiled at first use (over 30 s) and serve several CPU ranks only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        if "RANK" not in os.environ:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            os.environ.update(
                RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
        deepspeed.init_distributed(
            dist_backend="nccl" if device().type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
    return deepspeed


def save(scratch: Path, step: int, engines: dict[str, Engine], state: dict[str, Any]) -> None:
    """Checkpoint `engines` and `state` (JSON) at `step`: whole or not at all; the last two are kept."""
    folder = scratch / f"step-{step:08d}"
    with building(folder) as temporary:
        for name, engine in engines.items():
            engine.ds.save_checkpoint(str(temporary / name), tag="engine", save_latest=False)
        (temporary / "state.json").write_text(to_json({"step": step, **state}), encoding="utf-8")
        write_record(temporary, "checkpoint")
    for old in _newest_first(scratch)[KEPT:]:
        shutil.rmtree(old)


def resume(scratch: Path, engines: dict[str, Engine]) -> dict[str, Any] | None:
    """Load the newest whole checkpoint into `engines` and return its state; None where there is none.

    A damaged checkpoint is named in the log and passed over. DeepSpeed's files are pickled: they are read only when
    their sha256 are those that forja recorded as it wrote them.
    """
    for folder in _newest_first(scratch):
        try:
            read_record(folder)
        except ForjaError as e:
            logger.warning("checkpoint passed over: %s", e)
            continue
        for name, engine in engines.items():
            engine.ds.load_checkpoint(str(folder / name), tag="engine")
        state: dict[str, Any] = json.loads((folder / "state.json").read_bytes())
        logger.info("resumed from %s", folder.name)
        return state
    return None


def _newest_first(scratch: Path) -> list[Path]:
    return sorted(scratch.glob("step-*"), reverse=True)
