"""The tensors of Hugging Face folders by our names: one safetensors file or shards, read one tensor at a time."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from components.artifact import Damaged, ForjaError
from components.model.checkpoint import WEIGHTS, shapes_of
from components.model.gpt import GPTConfig
from components.model.hf_config import CONFIG, read_json

INDEX = "model.safetensors.index.json"
# Buffers that older files hold beside the weights: the causal mask and the rotary frequencies.
BUFFERS = re.compile(r"\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
# Our module's name, and theirs: several stand one below the other in ours.
GPT2 = {
    "wte": ["wte"],
    "wpe": ["wpe"],
    "norm": ["ln_f"],
    "norm1": ["ln_1"],
    "attention.qkv": ["attn.c_attn"],
    "attention.out": ["attn.c_proj"],
    "norm2": ["ln_2"],
    "mlp.up": ["mlp.c_fc"],
    "mlp.down": ["mlp.c_proj"],
}
LLAMA = {
    "wte": ["embed_tokens"],
    "norm": ["norm"],
    "norm1": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "norm2": ["post_attention_layernorm"],
    "mlp.up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.down": ["mlp.down_proj"],
}


class Part(NamedTuple):
    """One of their tensors: the rows start..stop of our tensor `ours`, which GPT-2 keeps transposed."""

    ours: str
    start: int
    stop: int
    transposed: bool
    shape: tuple[int, ...]  # theirs


def parts_of(config: GPTConfig, family: str) -> dict[str, Part]:
    """{their name: what it is of ours}, every tensor of the model once."""
    table, trunk, layers = (GPT2, "transformer.", "h") if family == "gpt2" else (LLAMA, "model.", "layers")
    kv = config.kv_heads * config.head_width
    found: dict[str, Part] = {}
    for ours, shape in shapes_of(config).items():
        module, _, leaf = ours.rpartition(".")
        if module == "head":
            prefix, names = "", ["lm_head"]
        elif module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
            prefix, names = f"{trunk}{layers}.{layer}.", table[module]
        else:
            prefix, names = trunk, table[module]
        cut = [config.heads * config.head_width, kv, kv] if len(names) == 3 else [shape[0] // len(names)] * len(names)
        transposed = family == "gpt2" and ours.startswith("blocks.") and len(shape) == 2
        start = 0
        for name, rows in zip(names, cut, strict=True):
            theirs = (rows, *shape[1:])
            found[f"{prefix}{name}.{leaf}"] = Part(
                ours, start, start + rows, transposed, theirs[::-1] if transposed else theirs
            )
            start += rows
    return found


def open_tensors(folder: Path, config: GPTConfig, family: str) -> Callable[[str], Tensor]:
    """A function from our tensor's name to the tensor, float32, read from `folder` when it is called.

    Names and shapes are compared first: ForjaError has one line for each that is missing, too many or of another shape.
    """
    at, parts = _locate(folder, family), parts_of(config, family)
    if config.tied and "lm_head.weight" in at:  # a copy, which some files repeat
        head, copied = _read(*at.pop("lm_head.weight")), next(t for t, p in parts.items() if p.ours == "wte.weight")
        if copied in at and not torch.equal(head, _read(*at[copied])):
            raise ForjaError(
                f"{folder}: lm_head.weight is not the embedding; set tie_word_embeddings to false in {CONFIG}"
            )
    wrong = [f"{folder}: {name}: missing" for name in parts if name not in at]
    wrong += [f"{folder}: {name}: no tensor of a {family} of this shape" for name in at if name not in parts]
    for name in parts.keys() & at.keys():
        shape, kind = _look(*at[name])
        if shape != parts[name].shape:
            wrong.append(f"{folder}: {name}: has the shape {list(shape)}, and {CONFIG} wants {list(parts[name].shape)}")
        if kind not in ("F32", "F16", "BF16", "F64"):
            wrong.append(f"{folder}: {name}: is of {kind}; take a model in float32, float16 or bfloat16")
    if wrong:
        raise ForjaError("\n".join(sorted(wrong)))
    pieces: dict[str, list[str]] = {}
    for name, part in parts.items():
        pieces.setdefault(part.ours, []).append(name)

    def tensor(ours: str) -> Tensor:
        read = [_read(*at[name]).float() for name in pieces[ours]]
        read = [t.T if parts[name].transposed else t for t, name in zip(read, pieces[ours], strict=True)]
        return read[0].contiguous() if len(read) == 1 else torch.cat(read)

    return tensor


def _locate(folder: Path, family: str) -> dict[str, tuple[Path, str]]:
    """{their full name: (file, name in it)} of every tensor in the folder's safetensors."""
    files = _files(folder)
    at = {name: (path, name) for path in files for name in _names(path) if not BUFFERS.search(name)}
    prefix = "transformer." if family == "gpt2" else "model."
    if not any(name.startswith(prefix) for name in at):  # a model saved without its head
        at = {name if name.startswith("lm_head.") else prefix + name: place for name, place in at.items()}
    return at


def _files(folder: Path) -> list[Path]:
    """The weight files of a folder: one, or the shards that its index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickled:
            raise ForjaError(
                f"{folder}: {pickled[0]} is a pickle, which forja does not open, and there is no {WEIGHTS}; where you "
                "trust it, convert it with transformers: from_pretrained(FOLDER).save_pretrained(OTHER)"
            )
        raise ForjaError(f"{folder}: neither {WEIGHTS} nor {INDEX}; name a folder with a model's safetensors")
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
        raise ForjaError(f"{folder / INDEX}: no weight_map from names to files; fetch it again")
    for shard in sorted(set(shards.values())):
        if shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise ForjaError(
                f"{folder / INDEX}: {shard!r} is not the name of a .safetensors beside it; do not trust it"
            )
        if not (folder / shard).is_file():
            raise ForjaError(f"{folder / shard}: missing, and {INDEX} names it; fetch it")
    files = [folder / shard for shard in sorted(set(shards.values()))]
    held = {name: path.name for path in files for name in _names(path)}
    lost = [f"{folder / INDEX}: {n}: is not in {s}; fetch it again" for n, s in shards.items() if held.get(n) != s]
    if lost:
        raise ForjaError("\n".join(lost))
    return files


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise Damaged(f"{path}: no whole safetensors file ({e}); fetch it again") from None


def _names(path: Path) -> Iterator[str]:
    with _opened(path) as f:
        yield from f.keys()


def _look(path: Path, name: str) -> tuple[tuple[int, ...], str]:
    with _opened(path) as f:
        piece = f.get_slice(name)
        return tuple(piece.get_shape()), str(piece.get_dtype())


def _read(path: Path, name: str) -> Tensor:
    with _opened(path) as f:
        tensor: Tensor = f.get_tensor(name)
        return tensor
