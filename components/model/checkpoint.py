"""A checkpoint folder: weights, shape, tokenizer and prompt templates, so that later stages need nothing else."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from components.artifact import Damaged, ForjaError, to_json
from components.data.chat import SEPARATOR, special
from components.model import parallel
from components.model.gpt import GPT, GPTConfig

WEIGHTS, SHAPE, TOKENIZER, PROMPTS = "model.safetensors", "model.json", "tokenizer.json", "prompts.json"
MARKS = "marks.json"  # in a checkpoint of someone else's model: what its tokenizer has in place of our separator


class Checkpoint(NamedTuple):
    model: GPT
    tokenizer: Tokenizer
    prompts: dict[str, dict[str, str]]


class Marks(NamedTuple):
    """The tokens around a text: `start` stands before it (None: nothing does), any of `ends` behind it."""

    start: int | None
    ends: tuple[int, ...]


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
    """The model in eval mode and float32 on `device`, its tokenizer and templates.

    Where no device is named it goes to `default_device()`, or over several if the environment says so (parallel.py).
    Raises Damaged where a file is missing or does not fit the shape. A quantized folder is for release/quantize.py's
    `load`, which takes either: training, which needs this one, does not depend on how models are quantized.
    """
    shape = shape_of(folder)
    if "quantization" in shape:
        raise ForjaError(f"{folder}: quantized, and cannot be trained on; name the folder that it was made from")
    config = GPTConfig.model_validate(shape)
    try:
        if device is None and parallel.wanted():
            return assembled(parallel.load_divided(hollow(config), folder / WEIGHTS), folder, None)
        model = filled(config, load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as e:
        why = f"its tensors are not those of {SHAPE} ({str(e).splitlines()[0]})"
        raise Damaged(f"{folder / WEIGHTS}: {why}; run the stage that makes it") from None
    return assembled(model, folder, device)


def filled(config: GPTConfig, state: Mapping[str, Tensor]) -> GPT:
    """The model whose weights are the tensors of `state`, which are not copied. Raises RuntimeError where they do not
    fit."""
    model = hollow(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    tied = config.head == "lm" and config.tied
    if unexpected or set(missing) - ({"head.weight"} if tied else set()):
        raise RuntimeError(f"missing {missing}, unexpected {unexpected}")
    if tied:
        model.head.weight = model.wte.weight
    return model


class _NoDraws(TorchFunctionMode):
    """Nothing is drawn for tensors without memory: PyTorch would import a second's worth of modules to do so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def hollow(config: GPTConfig) -> GPT:
    """A model whose weights have shapes but no memory."""
    with torch.device("meta"), _NoDraws():
        return GPT(config)


def shapes_of(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every tensor in a checkpoint's file, a tied one once."""
    state = hollow(config).state_dict()
    if config.head == "lm" and config.tied:
        del state["head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def write_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], tensor: Callable[[str], Tensor]) -> None:
    """A safetensors file of float32 tensors, each asked for when it is written: one at a time is in memory.

    Raises ForjaError where one holds NaN or infinity.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = tensor(name).to("cpu", torch.float32).contiguous()
            if tuple(values.shape) != tuple(shape):
                raise ValueError(f"{name} has the shape {tuple(values.shape)}, not {tuple(shape)}")
            if not torch.isfinite(values).all():
                raise ForjaError(f"{name}: holds NaN or infinity; take another copy of the model")
            f.write(values.numpy().data)


def marks_of(folder: Path, tokenizer: Tokenizer) -> Marks:
    """What stands around a text of this checkpoint's. Raises ForjaError where neither a file nor the tokenizer says."""
    if (folder / MARKS).is_file():
        try:
            said = json.loads((folder / MARKS).read_bytes())
            return Marks(said["start"], tuple(said["ends"]))
        except (ValueError, KeyError, TypeError) as e:
            raise Damaged(f"{folder / MARKS}: not a text's marks ({e}); import the model again") from None
    separator = special(tokenizer, SEPARATOR)
    return Marks(separator, (separator,))


def shape_of(folder: Path) -> dict[str, Any]:
    """What model.json says, once the folder's files are known to be there."""
    for name in (SHAPE, WEIGHTS, TOKENIZER):
        if not (folder / name).is_file():
            mend = "name a folder such as artifacts/sft"
            if name == SHAPE and (folder / "config.json").is_file():
                mend = f"make one of it by `forja import {folder} OUT`"
            raise Damaged(f"{folder / name}: missing, so {folder} is no checkpoint; {mend}")
    shape: dict[str, Any] = json.loads((folder / SHAPE).read_bytes())
    return shape


def assembled(model: GPT, folder: Path, device: str | torch.device | None) -> Checkpoint:
    """A model with its weights, with the tokenizer and the templates that lie beside them."""
    prompts = json.loads((folder / PROMPTS).read_bytes()) if (folder / PROMPTS).is_file() else {}
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.no_truncation()  # some tokenizers of other people's cut every text at a length
    tokenizer.no_padding()
    if not parallel.divided(model):
        model = model.to(device or default_device())
    return Checkpoint(model.eval(), tokenizer, prompts)


def default_device() -> torch.device:
    """FORJA_DEVICE, or this rank's GPU where there is one, or the CPU."""
    wanted = os.environ.get("FORJA_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if wanted == "cuda" else wanted)
