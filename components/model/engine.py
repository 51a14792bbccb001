"""Training moved by DeepSpeed: only this file, pipeline.py and nvme.py know it.

What a recipe says (learning rate, batch, precision) is `Optim`. What the machine has is not identity and comes from the
environment: FORJA_DEVICE (cpu, cuda), FORJA_MICRO_BATCH, FORJA_ZERO (stage 0 to 3), FORJA_OFFLOAD_OPTIMIZER and
FORJA_OFFLOAD_PARAMS (cpu, or nvme:FOLDER), FORJA_RECOMPUTE and FORJA_COMPILE (1), and a launcher's RANK and
WORLD_SIZE.
"""

import logging
import math
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from components.artifact import ForjaError
from components.model import nvme
from components.model.checkpoint import default_device as device
from components.model.checkpoint import filled
from components.model.fused import keep_freed_memory
from components.model.muon import Cut, Muon
from components.model.optim import Optim, optimiser
from components.model.ranks import added_up, micro_batch
from components.model.scratch import Piece, Shards
from components.world import from_launcher, world

STATES = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"step", "m", "v", "momentum"}}


class Place(NamedTuple):
    """Where a rank keeps numbers of a parameter: `length` of them, of the parameter, flattened, from `start` on, lie in
    `owner`, the tensor that the optimiser moves, from `at` on."""

    owner: Tensor
    at: int
    start: int
    length: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same numbers of `tensor`, which is the owner or a state of its size."""
        return tensor.detach().view(-1).narrow(0, self.at, self.length)


class Engine:
    """A model with its optimiser, as DeepSpeed drives them."""

    def __init__(self, model: nn.Module, optim: Optim, batch: int) -> None:
        keep_freed_memory()
        deepspeed = _deepspeed()
        self.optim, self.micro, self.zero = optim, micro_batch(batch), int(os.environ.get("FORJA_ZERO") or 0)
        self.model: Any = model.to(device())
        _prepare(self.model, self.zero)
        base = optimiser(model.named_parameters(), optim)
        self._folders = ExitStack()  # on a disk: deleted when the engine is done with, or gone
        weakref.finalize(self, self._folders.close)
        config = self._config(batch)
        if config["zero_optimization"].get("offload_param", {}).get("device") == "nvme":
            # Left to `initialize`, DeepSpeed 0.19.8 on a CPU writes weights to the disk in bfloat16.
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        self.ds, *_ = deepspeed.initialize(model=model, optimizer=base, config=config)
        head: Any = getattr(model, "head", None)
        if self.zero == 3 and head is not None:  # the loss reads its weight outside the head's own pass
            deepspeed.zero.register_external_parameter(model, head.weight)
        self.base = base if self.zero == 0 else self.ds.optimizer.optimizer
        if self.zero and isinstance(self.base, Muon):
            self.base.cuts = self._cuts()
        self._move, self.base.step = self.base.step, self._guarded  # type: ignore[method-assign]
        self.grad_norm = 0.0  # the global norm before clipping, of the last step taken
        self.taken = 0
        self.skipped = False  # whether the last step was left out, because its loss or gradient was not finite
        self.sums: dict[str, float] = {}  # what the last step measured, over all micro-batches and ranks
        self._adding: dict[str, Tensor] = {}
        nvme.keep_gradients(self.ds.optimizer)
        owners = self._owners() if optim.ema is not None else ()
        self._average = {id(owner): owner.detach().clone() for owner, _ in owners}

    def _config(self, batch: int) -> dict[str, Any]:
        """DeepSpeed's words for all of it."""
        return {
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_clipping": self.optim.clip,
            # Without modules that are "safe" in bfloat16, gradients are added up between ranks in float32.
            "torch_autocast": {
                "enabled": self.optim.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
            "zero_optimization": {"stage": self.zero, **self._offload()},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 60,
        }

    def _offload(self) -> dict[str, Any]:
        """DeepSpeed's words for what lies outside the device's memory. Raises ForjaError for what it cannot do."""
        out: dict[str, Any] = {}
        disks: dict[str, Path | None] = {"optimizer": None, "params": None}
        for what, key, least in (("OPTIMIZER", "offload_optimizer", 1), ("PARAMS", "offload_param", 3)):
            where = os.environ.get(f"FORJA_OFFLOAD_{what}")
            kind, _, folder = (where or "").partition(":")
            said = f"FORJA_OFFLOAD_{what}={where}"
            stage = 3 if kind == "nvme" else least
            if where and (kind not in ("cpu", "nvme") or (kind == "nvme") != bool(folder)):
                raise ForjaError(f"{said}: is neither cpu nor nvme:FOLDER; set it to one of them")
            if where and self.zero < stage:
                raise ForjaError(f"{said}: needs FORJA_ZERO={stage}{' or more' if stage < 3 else ''}")
            if kind == "nvme" and self.optim.matrix_lr is not None:
                raise ForjaError(f"{said}: not with Muon, whose momenta stay in memory; set it to cpu")
            if kind == "nvme":
                disks[what.lower()] = Path(folder)
            elif where:
                out[key] = {"device": "cpu", "pin_memory": device().type == "cuda"}
        if any(disks.values()):
            sizes = [-(-p.numel() // world()[1]) for p in self.model.parameters() if p.requires_grad]
            out |= nvme.settings(**disks, sizes=sizes, folders=self._folders)
        return out

    def set_rate(self, part: float) -> None:
        """Give every group `part` of its full rate."""
        for group in self.ds.optimizer.param_groups:
            group["lr"] = part * group["full"]

    def step(self, loss_sum: Tensor, total: float, measured: dict[str, Tensor] | None = None) -> None:
        """Take in one micro-batch; the weights move with the last one of the global batch.

        `loss_sum` is the micro-batch's sum, `total` the count that the global batch divides by. It and `measured` are
        then in `sums`.

        DeepSpeed averages over micro-batches and ranks; their number is multiplied back so that the gradient is that
        of sum / total however the batch is cut.
        """
        for name, value in {"loss": loss_sum, **(measured or {})}.items():
            so_far = self._adding.get(name)
            self._adding[name] = value.detach().double() + (0.0 if so_far is None else so_far)
        accumulation = self.ds.gradient_accumulation_steps()
        self.ds.backward(loss_sum * (accumulation * world()[1] / total))
        last = self.ds.is_gradient_accumulation_boundary()
        if last:
            self.sums = dict(zip(self._adding, added_up(torch.stack(list(self._adding.values()))), strict=True))
            self._adding = {}
            self.skipped = not math.isfinite(self.sums["loss"])
            if self.zero == 0:  # before they are clipped and cleared
                grads = [p.grad for p in self.model.parameters() if p.grad is not None]
                self.grad_norm = float(nn.utils.get_total_norm(grads))
                self.skipped |= not math.isfinite(self.grad_norm)
        self.ds.step()
        if last and self.zero:  # where it is not finite, DeepSpeed has left the step out by itself
            self.grad_norm = float(self.ds.get_global_grad_norm())
            self.skipped |= not math.isfinite(self.grad_norm)
        if last and not self.skipped:
            self.taken += 1
            nvme.check(self.ds.optimizer)
            self._follow()

    def _guarded(self, *arguments: Any, **keywords: Any) -> Any:
        """In place of the optimiser's `step`: weights and moments stay as they are where the step is left out."""
        return None if self.skipped else self._move(*arguments, **keywords)

    @torch.no_grad()
    def _follow(self) -> None:
        """The average comes after the weights: faster in the first steps, where they still go far."""
        if self.optim.ema is not None:
            decay = min(self.optim.ema, (1 + self.taken) / (10 + self.taken))
            for owner, _ in self._owners():
                self._average[id(owner)].lerp_(owner, 1 - decay)

    def places(self) -> dict[str, Place]:
        """{parameter: where this rank keeps its float32 numbers}, without those that other ranks keep alone."""
        return {n: place for n, p in self.model.named_parameters() if (place := self._place(p)) is not None}

    def _owners(self, changed: bool = False) -> Iterator[tuple[Tensor, dict[str, Place]]]:
        """The tensors that the optimiser moves, each brought in from the disk for its turn, with what lies in it."""
        owners: dict[int, dict[str, Place]] = {}
        for name, place in self.places().items():
            owners.setdefault(id(place.owner), {})[name] = place
        for places in owners.values():
            owner = next(iter(places.values())).owner
            with nvme.brought_in(self.ds.optimizer, owner, changed):
                yield owner, places

    def _place(self, p: Any) -> Place | None:  # DeepSpeed hangs its own attributes on parameters
        if self.zero == 0:
            return Place(p, 0, 0, p.numel())
        zero = self.ds.optimizer
        if self.zero == 3:
            group, at, length = zero.grad_position[zero.get_param_id(p)]
            start = world()[0] * length
            length = min(length, p.ds_numel - start)  # the last ranks' are padded
            return Place(zero.fp32_partitioned_groups_flat[group], at, start, length) if length > 0 else None
        cut = p._hp_mapping
        if cut is None:
            return None
        owner = zero.single_partition_of_fp32_groups[cut.param_group_index]
        at, length = cut.hp_fragment_address.start, cut.hp_fragment_address.numel
        return Place(owner, at, cut.lp_fragment_address.start, length)

    def _cuts(self) -> dict[int, list[Cut]]:
        """What lies in which of the flat tensors that ZeRO steps with, as Muon asks; the same order on every rank."""
        zero = self.ds.optimizer
        flats = zero.fp32_partitioned_groups_flat if self.zero == 3 else zero.single_partition_of_fp32_groups
        cuts: dict[int, list[Cut]] = {}
        for flat, group in zip(flats, zero.fp16_groups if self.zero == 3 else zero.bit16_groups, strict=True):
            for p in group:
                shape = getattr(p, "ds_shape", p.shape)
                if len(shape) == 2:
                    _, at, start, length = self._place(p) or Place(flat, 0, 0, 0)
                    cuts.setdefault(id(flat), []).append(Cut(shape[0], shape[1], at, start, length))
        return cuts

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes of a checkpoint. Where every rank holds all, each writes its share."""
        rank, ranks = world()
        yield Piece("taken", 0, torch.tensor([self.taken]))
        for i, (owner, places) in enumerate(self._owners()):
            for name, place in places.items() if self.zero or i % ranks == rank else ():
                yield Piece(f"weight/{name}", place.start, place.of(owner))
                if self._average:
                    yield Piece(f"average/{name}", place.start, place.of(self._average[id(owner)]))
                for key, value in self.base.state.get(owner, {}).items():
                    whole = value.numel() == owner.numel() and value.dim() > 0
                    start = place.start if whole else 0
                    yield Piece(f"{key}/{name}", start, place.of(value) if whole else value.view(1))

    @torch.no_grad()
    def restore(self, shards: Shards, name: str) -> None:
        """Take weights, averages and the optimiser's state from a checkpoint, where this engine is called `name`.

        Raises ForjaError where the checkpoint is of another model.
        """
        self._fits(shards, name)
        kinds = {key.partition("/")[0] for key in shards.names(f"{name}/")} - {"weight", "average", "taken"}
        if strange := sorted(kinds - STATES[type(self.base)]):
            why = f"{strange[0]} is of another optimiser than {type(self.base).__name__}"
            raise ForjaError(f"{shards.folder}: {why}; delete {shards.folder.parent}")
        self.taken = int(shards.read(f"{name}/taken", 0, 1))
        for _, places in self._owners(changed=True):
            for parameter, place in places.items():
                self._fill(shards, name, kinds, parameter, place)
        self._spread()

    def _fill(self, shards: Shards, name: str, kinds: set[str], parameter: str, place: Place) -> None:
        """Take what lies at `place` from a checkpoint."""
        read = lambda what: shards.read(f"{name}/{what}/{parameter}", place.start, place.length)  # noqa: E731
        place.of(place.owner).copy_(read("weight"))
        if self._average:
            place.of(self._average[id(place.owner)]).copy_(read("average"))
        for kind in kinds:
            size = shards.size(f"{name}/{kind}/{parameter}")
            if size == 0:  # a parameter that had not moved yet
                continue
            state = self.base.state[place.owner]
            if size == 1 < place.owner.numel() or kind == "step":
                step = shards.read(f"{name}/{kind}/{parameter}", 0, 1)[0]
                state[kind] = step.to(place.owner.device, copy=True)
            else:
                state.setdefault(kind, torch.zeros_like(place.owner))
                place.of(state[kind]).copy_(read(kind))

    def _fits(self, shards: Shards, name: str) -> None:
        """Raises ForjaError, naming the first parameter that the checkpoint has in another size."""
        sizes = {n: getattr(p, "ds_numel", p.numel()) for n, p in self.model.named_parameters()}
        saved = {n: shards.size(f"{name}/weight/{n}") for n in shards.names(f"{name}/weight/")}
        for parameter in sorted(sizes.keys() | saved.keys()):
            here, there = sizes.get(parameter, 0), saved.get(parameter, 0)
            if here != there:
                raise ForjaError(
                    f"{shards.folder}: {parameter} has {there} numbers there and {here} in this model; "
                    f"delete {shards.folder.parent}"
                )

    def _spread(self) -> None:
        """Make the weights that the model computes with those that the optimiser keeps."""
        zero = self.ds.optimizer
        if self.zero in (1, 2):
            zero.update_lp_params()
        elif self.zero == 3:
            zero._partition_all_parameters()
            for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
                with nvme.brought_in(zero, flat, False):
                    zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @torch.no_grad()
    def finished(self) -> Any:
        """The trained model, whole on every rank: the average, where the recipe asks for one.

        It is the model that was given, but for stage 3, which has taken that to pieces. The engine is done with.
        """
        if self._average:
            for owner, _ in self._owners(changed=True):
                owner.copy_(self._average[id(owner)])
            self._spread()
        if self.zero < 3:
            for block in getattr(self.model, "blocks", ()):
                block._compiled_call_impl = None  # generation, of ever other lengths, would compile again and again
            return self.model
        whole = {n: torch.zeros(p.ds_shape, device=device()) for n, p in self.model.named_parameters()}
        for owner, places in self._owners():
            for name, place in places.items():
                whole[name].view(-1)[place.start : place.start + place.length] = place.of(owner)
        for numbers in whole.values():
            torch.distributed.all_reduce(numbers)
        self._folders.close()
        return filled(self.model.config, whole)


def _prepare(model: Any, zero: int) -> None:
    """What costs seconds or memory and changes no result, by the environment."""
    if os.environ.get("FORJA_RECOMPUTE") == "1":
        model.recompute = True
    if os.environ.get("FORJA_COMPILE") == "1":
        if zero == 3:
            raise ForjaError("FORJA_COMPILE=1: not together with FORJA_ZERO=3; leave one of them out")
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler) is None:
            raise ForjaError(
                f"FORJA_COMPILE=1: needs a C++ compiler, and {compiler} is not there; install it or set CXX"
            )
        for block in model.blocks:  # not the embedding, whose gradient is slow when compiled, nor the loss
            block.compile()


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
        from_launcher()
        backend = "nccl" if device().type == "cuda" else "gloo"
        if "RANK" not in os.environ:  # a group of one meets in memory: no port that another program could take
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed
