"""The promoted model in small: int8 and int4 weight-only by torchao, as safetensors that load back bit for bit.

Which tensor becomes what:

- The token embedding is also the head (tied). In a small model it holds a large share of the weights, and it decides
  every logit, so it is quantized on purpose and gently: int8, one scale a row (a token), in both schemes. One int8
  tensor serves the lookup and the head. An untied head is treated the same way, on its own.
- The matrices of the blocks: int8 with one scale a row, or int4, asymmetric, in groups of `int4_group` columns with a
  bfloat16 scale (which has float32's range, so a group of zeros keeps a scale above 0) and an int8 zero point.
- Learned positions stay float, as bfloat16: they are added to every token's state, few, and precise enough so.
- Norms and biases stay float32: a few vectors whose bytes do not show, and whose errors would scale whole channels.

In the file two int4 values share a byte; manifest.json says how each tensor is stored. Activations are never quantized.
"""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.artifact import Damaged, ForjaError, to_json
from components.log import Log
from components.model import checkpoint
from components.model.checkpoint import PROMPTS, SHAPE, TOKENIZER, WEIGHTS, Checkpoint
from components.model.gpt import GPT, GPTConfig

# At its import torchao warns of GPU kernels that it does not find on a CPU, and of its own deprecated calls.
for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

from torchao.quantization import (  # noqa: E402
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    quantize_,
)

Scheme = Literal["int8", "int4"]
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
MANIFEST = "manifest.json"
WHY = {
    "int8_row": "embedding, head and int8 matrices: symmetric int8, one float32 scale a row",
    "int4_group": "int4 matrices: asymmetric int4, two a byte, a bfloat16 scale and int8 zero point a group of columns",
    "bfloat16": "learned positions: few, added to every token's state",
    "float32": "norms and biases: few, and an error would scale a whole channel",
}


class Config(BaseModel, frozen=True, extra="forbid"):
    # Columns that share a scale: an even number that divides the columns of every matrix of the blocks.
    int4_group: int = Field(ge=2, multiple_of=2)


def run(cfg: Config, ppo: Path, out: Path, log: Log) -> dict[str, float]:
    """Write out/int8 and out/int4, two checkpoint folders; load each back and compare its logits with the full model's.

    `logit_deviation` is the largest |difference| over one batch of random tokens; `bits_per_weight` counts all weights.
    """
    full = load(ppo, checkpoint.default_device())
    full_bytes = (ppo / WEIGHTS).stat().st_size
    weights = sum(p.numel() for p in full.model.parameters())
    ids = torch.randint(
        full.model.config.vocab_size, (2, full.model.config.context), generator=torch.Generator().manual_seed(0)
    )
    ids = ids.to(full.model.wte.weight.device)
    metrics = {"full.bytes": float(full_bytes)}
    schemes: tuple[Scheme, Scheme] = ("int8", "int4")
    for step, scheme in enumerate(schemes):
        small = quantized(full.model, scheme, cfg.int4_group)
        save(small, out / scheme, ppo, scheme, cfg.int4_group)
        n_bytes = (out / scheme / WEIGHTS).stat().st_size
        with torch.no_grad():
            deviation = (load(out / scheme).model(ids) - full.model(ids)).abs().max().item()
        metrics |= {
            f"{scheme}.bytes": float(n_bytes),
            f"{scheme}.bytes_ratio": n_bytes / full_bytes,
            f"{scheme}.bits_per_weight": 8 * n_bytes / weights,
            f"{scheme}.logit_deviation": deviation,
            **weight_errors(full.model, small, scheme),
        }
        log({**metrics, "progress": (step + 1) / len(schemes)}, step)
    return metrics


def quantized(model: GPT, scheme: Scheme, group: int) -> GPT:
    """A copy of `model` with the weights of `scheme`. Raises ForjaError where `group` does not divide a matrix."""
    small = copy.deepcopy(model)
    by_row = Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
    in_groups = IntxWeightOnlyConfig(
        weight_dtype=INT4,
        granularity=PerGroup(group),
        mapping_type=MappingType.ASYMMETRIC,
        scale_dtype=torch.bfloat16,
    )
    for name, matrix in block_matrices(small).items():
        columns = matrix.in_features
        if scheme == "int4" and columns % group:
            raise ForjaError(
                f"quantize.int4_group: {group} does not divide the {columns} columns of {name}; take a divisor"
            )
    embedding = ["wte"] if small.config.tied else ["wte", "head"]
    quantize_(small, by_row, lambda module, name: name in embedding)
    quantize_(small, by_row if scheme == "int8" else in_groups, lambda module, name: name in block_matrices(model))
    if small.config.tied:
        small.head.weight = small.wte.weight
    if small.wpe is not None:
        small.wpe.weight.data = small.wpe.weight.data.bfloat16().float()
    return small.requires_grad_(False).eval()


def block_matrices(model: GPT) -> dict[str, nn.Linear]:
    """The linear layers of the blocks, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")}


def save(model: GPT, folder: Path, source: Path, scheme: Scheme, group: int) -> None:
    """Write a quantized model as a checkpoint folder; tokenizer and prompt templates are those of `source`."""
    stored: dict[str, Tensor] = {}
    manifest: dict[str, dict[str, Any]] = {}
    for name, p in model.named_parameters():  # a tied tensor comes once, under the embedding's name
        if isinstance(p, Int8Tensor):
            kind, parts = "int8_row", {".qdata": p.qdata, ".scale": p.scale}  # symmetric: its zero points are all 0
        elif isinstance(p, IntxUnpackedToInt8Tensor):
            kind = "int4_group"
            parts = {".qdata": pack_int4(p.qdata), ".scale": p.scale, ".zero_point": p.zero_point}
        elif name == "wpe.weight":
            kind, parts = "bfloat16", {"": p.bfloat16()}
        else:
            kind, parts = "float32", {"": p.float()}
        stored |= {name + part: tensor.detach().cpu().contiguous() for part, tensor in parts.items()}
        manifest[name] = {"stored": kind, "shape": list(p.shape), "full_bytes": 4 * p.numel()}
    folder.mkdir(parents=True)
    save_file(stored, folder / WEIGHTS)
    shape = {**model.config.model_dump(), "quantization": {"scheme": scheme, "int4_group": group}}
    (folder / SHAPE).write_text(to_json(shape), encoding="utf-8")
    why = {kind: WHY[kind] for kind in sorted({entry["stored"] for entry in manifest.values()})}
    (folder / MANIFEST).write_text(
        to_json({"scheme": scheme, "group": group, "tensors": manifest, "why": why}), encoding="utf-8"
    )
    for name in (TOKENIZER, PROMPTS):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def load(folder: Path, device: str | torch.device | None = None) -> Checkpoint:
    """Any checkpoint folder, quantized or not: model in eval mode, tokenizer and templates, on `device` (default: a GPU
    where there is one). Raises Damaged where a file is missing or does not fit."""
    shape = checkpoint.shape_of(folder)
    if "quantization" not in shape:
        return checkpoint.load(folder, device)
    return checkpoint.assembled(restore(folder, shape), folder, device)


def restore(folder: Path, config: dict[str, Any]) -> GPT:
    """The quantized model of `folder`, its weights those that were saved, bit for bit. `config` is its model.json.

    Raises Damaged where manifest, file and shape do not fit each other.
    """
    model = GPT(GPTConfig.model_validate({k: v for k, v in config.items() if k != "quantization"}))
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        stored = load_file(folder / WEIGHTS)
        for name, entry in manifest["tensors"].items():
            tensor = _restored(stored, name, entry, manifest["group"])
            owner, _, leaf = name.rpartition(".")
            if tensor.shape != model.get_parameter(name).shape:
                raise Damaged(f"{folder / WEIGHTS}: {name} does not have its shape; run `forja stage quantize` again")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    except (OSError, KeyError, AttributeError, ValueError) as e:
        raise Damaged(f"{folder}: {MANIFEST} and {WEIGHTS} do not fit ({e}); run `forja stage quantize` again") from e
    if model.config.tied:
        model.head.weight = model.wte.weight
    return model.requires_grad_(False).eval()


def _restored(stored: dict[str, Tensor], name: str, entry: dict[str, Any], group: int) -> Tensor:
    if entry["stored"] in ("bfloat16", "float32"):
        return stored[name].float()
    qdata, scale = stored[f"{name}.qdata"], stored[f"{name}.scale"]
    if entry["stored"] == "int8_row":
        zero = torch.zeros_like(scale, dtype=torch.int8)
        return Int8Tensor(qdata, scale, [1, qdata.shape[1]], torch.float32, zero_point=zero)
    zero = stored[f"{name}.zero_point"]
    return IntxUnpackedToInt8Tensor(unpack_int4(qdata), scale, zero, INT4, (1, group), torch.float32, None)


def pack_int4(values: Tensor) -> Tensor:
    """int8 values in [-8, 7], [rows, columns] with even columns, as uint8 [rows, columns / 2]: even columns low."""
    shifted = (values + 8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of pack_int4."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).to(torch.int8) - 8


def affine(weight: Tensor, bits: int, per_channel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The plain affine scheme over the range of the tensor, or of each row: q, scale and zero point (both float).

    scale = (max - min) / (2^bits - 1), zero = -min / scale, q = round(weight / scale + zero). A constant tensor has no
    range; its scale is taken as 1, and it comes back exactly. An outlier coarsens its whole tensor, or its row alone.
    """
    low, high = torch.aminmax(weight, dim=1, keepdim=True) if per_channel else torch.aminmax(weight)
    span = (high - low) / (2**bits - 1)
    scale = torch.where(span > 0, span, torch.ones_like(span))
    zero = -low / scale
    return torch.round(weight / scale + zero).clamp(0, 2**bits - 1), scale, zero


def undo_affine(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (q - zero) * scale


def weight_errors(full: GPT, small: GPT, scheme: Scheme) -> dict[str, float]:
    """||W - Q(W)||^2 / ||W||^2 over the matrices of the blocks: torchao's, and the plain scheme's in the same bits."""
    bits = 8 if scheme == "int8" else 4
    weights = {n: m.weight for n, m in block_matrices(full).items()}
    torchao = {n: m.weight.dequantize() for n, m in block_matrices(small).items()}
    schemes: dict[str, Callable[[str], Tensor]] = {
        "torchao": lambda n: torchao[n],
        "tensor": lambda n: undo_affine(*affine(weights[n], bits, per_channel=False)),
        "channel": lambda n: undo_affine(*affine(weights[n], bits, per_channel=True)),
    }
    total = sum(w.square().sum().item() for w in weights.values())
    return {
        f"{scheme}.weight_error.{kind}": sum((w - back(n)).square().sum().item() for n, w in weights.items()) / total
        for kind, back in schemes.items()
    }
