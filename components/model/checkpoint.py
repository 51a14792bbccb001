"""A checkpoint folder: weights, shape, tokenizer and prompt templates, so that later stages need nothing else."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from components.artifact import Damaged, ForjaError, to_json
from components.model.gpt import GPT, GPTConfig

WEIGHTS, SHAPE, TOKENIZER, PROMPTS = "model.safetensors", "model.json", "tokenizer.json", "prompts.json"


class Checkpoint(NamedTuple):
    model: GPT
    tokenizer: Tokenizer
    prompts: dict[str, dict[str, str]]


def save(model: GPT, folder: Path, tokenizer: Path, prompts: dict[str, dict[str, str]] | None = None) -> None:
    """Write float32 weights (a tied tensor once), the shape, the tokenizer's file and, if given, the templates."""
    state = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in model.state_dict().items()}
    if model.config.head == "lm" and model.config.tied:
        del state["head.weight"]
    bad = [k for k, v in state.items() if not torch.isfinite(v).all()]
    if bad:
        raise ValueError(f"{bad[0]} holds NaN or infinity; the checkpoint was not written")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS)
    (folder / SHAPE).write_text(to_json(model.config.model_dump()), encoding="utf-8")
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    if prompts is not None:
        (folder / PROMPTS).write_text(to_json(prompts), encoding="utf-8")


def load(folder: Path, device: str | torch.device | None = None) -> Checkpoint:
    """The model in eval mode and float32 on `device` (default: `default_device()`), its tokenizer and templates.

    Raises Damaged where a file is missing or does not fit the shape. A quantized folder is for release/quantize.py's
    `load`, which takes either: training, which needs this one, does not depend on how models are quantized.
    """
    shape = shape_of(folder)
    if "quantization" in shape:
        raise ForjaError(f"{folder}: quantized, and cannot be trained on; name the folder that it was made from")
    model = GPT(GPTConfig.model_validate(shape))
    missing, unexpected = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    if unexpected or set(missing) - {"head.weight"}:
        raise Damaged(f"{folder / WEIGHTS}: its tensors are not those of {SHAPE}; run the stage that makes it")
    return assembled(model, folder, device)


def shape_of(folder: Path) -> dict[str, Any]:
    """What model.json says, once the folder's files are known to be there."""
    for name in (SHAPE, WEIGHTS, TOKENIZER):
        if not (folder / name).is_file():
            raise Damaged(
                f"{folder / name}: missing, so {folder} is no checkpoint; name a folder such as artifacts/sft"
            )
    shape: dict[str, Any] = json.loads((folder / SHAPE).read_bytes())
    return shape


def assembled(model: GPT, folder: Path, device: str | torch.device | None) -> Checkpoint:
    """A model with its weights, with the tokenizer and the templates that lie beside them."""
    prompts = json.loads((folder / PROMPTS).read_bytes()) if (folder / PROMPTS).is_file() else {}
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    return Checkpoint(model.to(device or default_device()).eval(), tokenizer, prompts)


def default_device() -> torch.device:
    """FORJA_DEVICE, or this rank's GPU where there is one, or the CPU."""
    wanted = os.environ.get("FORJA_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if wanted == "cuda" else wanted)
