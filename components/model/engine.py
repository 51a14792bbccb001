"""Training moved by DeepSpeed: the only file that knows it.

What a recipe says (learning rate, batch, precision) is `Optim`. What the machine has is not identity and comes from the
environment: FORJA_DEVICE (cpu, cuda), FORJA_MICRO_BATCH, FORJA_ZERO (stage 0 to 3), and a launcher's RANK and
WORLD_SIZE. A checkpoint is a folder sealed with a record; the newest whole one is where a run goes on.
"""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from components.artifact import ForjaError, building, read_record, to_json, write_record
from components.model.checkpoint import default_device as device
from components.model.fused import keep_freed_memory
from components.model.muon import Muon

KEPT = 2  # checkpoints on disk: the newest, and the one before it in case the newest is damaged
Item = TypeVar("Item")
logger = logging.getLogger("forja")


class Optim(BaseModel, frozen=True, extra="forbid"):
    """The optimiser and its schedule: linear warmup, the full rate, a linear decay over the last part.

    `matrix_lr` is Muon's rate for the blocks' matrices; with None AdamW moves them too. Weights and optimiser are in
    float32 always; with `bf16` the products are taken in bfloat16 (autocast).
    """

    lr: float = Field(gt=0)
    matrix_lr: float | None = Field(gt=0)
    lr_floor: float = Field(ge=0, le=1)  # what is left of the rate at the last step
    warmup: int = Field(ge=0)
    decay: float = Field(ge=0, le=1)  # the share of the steps over which the rate falls
    weight_decay: float = Field(ge=0)
    beta2: float = Field(gt=0, lt=1)
    clip: float = Field(gt=0)
    precision: Literal["fp32", "bf16"]


def world() -> tuple[int, int]:
    """(rank, ranks)."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def schedule(optim: Optim, step: int, steps: int) -> float:
    """The part of the full rate at `step` (from 0) of `steps`: warmup, stable, decay (Hu et al. 2024, section 4)."""
    up = (step + 1) / optim.warmup if step < optim.warmup else 1.0
    falling = optim.decay * steps
    left = (steps - step) / falling if falling > 0 else 1.0
    return min(up, optim.lr_floor + (1 - optim.lr_floor) * min(1.0, left))


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
        keep_freed_memory()
        deepspeed = _deepspeed()
        self.optim, self.micro = optim, micro_batch(batch)
        zero = int(os.environ.get("FORJA_ZERO", "0"))
        if zero and optim.matrix_lr is not None:
            raise ForjaError(
                f"FORJA_ZERO={zero}: cuts matrices into pieces, which Muon needs whole; set matrix_lr=null"
            )
        self.ds, *_ = deepspeed.initialize(
            model=model.to(device()),
            optimizer=_optimiser(model, optim),
            config={
                "train_batch_size": batch,
                "train_micro_batch_size_per_gpu": self.micro,
                "gradient_clipping": optim.clip,
                "torch_autocast": {"enabled": optim.precision == "bf16", "dtype": "bfloat16"},
                "zero_optimization": {"stage": zero},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 1 << 60,
            },
        )
        self.grad_norm = 0.0  # the global norm before clipping, of the last step taken

    def set_rate(self, part: float) -> None:
        """Give every group `part` of its full rate."""
        for group in self.ds.optimizer.param_groups:
            group["lr"] = part * group["full"]

    def step(self, loss_sum: Tensor, total: float) -> None:
        """Take in one micro-batch; the weights move with the last one of the global batch.

        `loss_sum` is the micro-batch's sum, `total` the count that the global batch divides by.

        DeepSpeed averages over micro-batches and ranks; their number is multiplied back so that the gradient is that
        of sum / total however the batch is cut.
        """
        accumulation = self.ds.gradient_accumulation_steps()
        self.ds.backward(loss_sum * (accumulation * world()[1] / total))
        if self.ds.is_gradient_accumulation_boundary():  # before they are clipped and cleared
            grads = [p.grad for p in self.ds.module.parameters() if p.grad is not None]
            self.grad_norm = float(nn.utils.get_total_norm(grads))
        self.ds.step()


def _optimiser(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Vectors (norms, biases) are not decayed: decay is a prior on matrices."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    vectors = {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0, "full": optim.lr}
    inner = [p for n, p in named if p.dim() > 1 and n.startswith("blocks.")]
    outer = [p for n, p in named if p.dim() > 1 and not n.startswith("blocks.")]  # embeddings, head
    if optim.matrix_lr is None:
        matrices = {"params": inner + outer, "weight_decay": optim.weight_decay, "full": optim.lr}
        return torch.optim.AdamW([matrices, vectors], lr=optim.lr, betas=(0.9, optim.beta2), eps=1e-8, fused=True)
    embeddings = {"params": outer, "weight_decay": optim.weight_decay, "full": optim.lr}
    return Muon(inner, optim.matrix_lr, [embeddings, vectors], optim.beta2)


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
        backend = "nccl" if device().type == "cuda" else "gloo"
        if "RANK" not in os.environ:  # a group of one meets in memory: no port that another program could take
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
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
