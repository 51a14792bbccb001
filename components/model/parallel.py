"""A model larger than one device, for generation and evaluation: its blocks over GPUs, memory and disk.

Asked for by the environment, because it is hardware and not identity. FORJA_DEVICE_MAP is `auto` or a JSON file that
maps parts of the model to devices, in accelerate's form: {"": "cuda:0", "blocks.7": "cpu", "blocks.8": "disk"}.
FORJA_MEMORY limits what `auto` may give each device to weights: "cuda:0=20GB,cpu=60GB". What fits nowhere stays in the
checkpoint's own file and is read from there each time its turn comes. Embedding, last norm and head stay on the first
device.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from components.artifact import ForjaError
from components.model.gpt import GPT

Device = int | str  # accelerate's names: a GPU's number, "cpu" or "disk"


def wanted() -> bool:
    """Whether models are to be divided."""
    return bool(os.environ.get("FORJA_DEVICE_MAP"))


def divided(model: GPT) -> bool:
    """Whether parts of the model are on several devices, so that it cannot be moved."""
    return hasattr(model, "hf_device_map")


def load_divided(model: GPT, weights: Path) -> GPT:
    """Fill a model without memory from a checkpoint's file, divided as the environment asks; it is never in memory as
    a whole.

    Raises ForjaError where the map or the limits do not fit the model, RuntimeError where the file does not.
    """
    from accelerate import dispatch_model

    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of what is meant: weights that stay on disk
    asked = os.environ["FORJA_DEVICE_MAP"]
    layout = computed(model, os.environ.get("FORJA_MEMORY")) if asked == "auto" else given(model, Path(asked))
    _fill(model, weights, layout)
    main = layout["wte"]
    if set(layout.values()) != {main}:
        on_disk = [n for n, _ in model.named_parameters() if layout[_part(n)] == "disk"]
        index = {n: {"safetensors_file": str(weights), "weight_name": n, "dtype": "float32"} for n in on_disk}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The following device_map keys")  # smear is no module
            dispatch_model(model, layout, main_device=main, offload_index=index or None)
    else:
        model.__dict__["hf_device_map"] = layout
    return model


def computed(model: GPT, memory: str | None) -> dict[str, Device]:
    """The blocks in order over the devices that have room, each whole; what is left over on disk."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_max_memory

    limits: dict[Device, int] = _limits(memory) if memory else get_max_memory()
    main = next(iter(limits))
    parts = dict(_parts(model))
    outer = sum({id(p): p.nbytes for part, ps in parts.items() if "." not in part for p in ps}.values())
    block = max(sum(p.nbytes for p in ps) for part, ps in parts.items() if "." in part)
    if limits[main] < outer + block:
        raise ForjaError(
            f"FORJA_MEMORY: {main} has {limits[main] / 1e6:,.0f} MB, but the embedding, the head and one block "
            f"at a time take {(outer + block) / 1e6:,.0f} MB; give it more"
        )
    limits[main] -= outer
    found = infer_auto_device_map(model.blocks, limits, no_split_module_classes=["Block"], clean_result=False)
    return {part: found[part.removeprefix("blocks.")] if "." in part else main for part in parts}


def given(model: GPT, path: Path) -> dict[str, Device]:
    """The map of a JSON file; each part goes where the longest name that begins it is sent."""
    try:
        said: dict[str, Device] = json.loads(path.read_bytes())
        said = {name: _device(device) for name, device in said.items()}
    except (OSError, ValueError, AttributeError) as e:
        raise ForjaError(f"FORJA_DEVICE_MAP={path}: {e}; name `auto` or a JSON file of parts and devices") from None
    layout: dict[str, Device] = {}
    for part, _ in _parts(model):
        above = [n for n in said if n in ("", part) or part.startswith(f"{n}.")]
        if not above:
            raise ForjaError(f'FORJA_DEVICE_MAP={path}: says nothing of {part}; "" names all that is not named')
        layout[part] = said[max(above, key=len)]
    outer = {device for part, device in layout.items() if "." not in part}
    if len(outer) > 1 or "disk" in outer:
        raise ForjaError(f"FORJA_DEVICE_MAP={path}: wte, norm and head go to one device, which is not the disk")
    if outer == {"cpu"} and set(layout.values()) - {"cpu", "disk"}:
        raise ForjaError(f"FORJA_DEVICE_MAP={path}: wte on the cpu and blocks on a GPU; put wte on the first GPU")
    return layout


def _limits(memory: str) -> dict[Device, int]:
    """What "cuda:0=10GB,cpu=60MB" says, in bytes: GPUs by number, then the memory; the disk has no limit."""
    from accelerate.utils import convert_file_size_to_int

    limits: dict[Device, int] = {}
    for entry in memory.split(","):
        name, _, size = entry.partition("=")
        try:
            size = size.strip()
            limits[_device(name.strip())] = int(size) if size.isdecimal() else convert_file_size_to_int(size)
        except ValueError:
            mend = "write DEVICE=SIZE, such as cuda:0=20GB or cpu=500MB"
            raise ForjaError(f"FORJA_MEMORY={memory}: {entry!r} is no limit; {mend}") from None
    limits.pop("disk", None)
    if not limits:
        raise ForjaError(f"FORJA_MEMORY={memory}: names no GPU and no cpu; give one of them some memory")
    return dict(sorted(limits.items(), key=lambda limit: (limit[0] == "cpu", limit[0])))


def _device(name: Any) -> Device:
    text = str(name).removeprefix("cuda:")
    if text in ("cpu", "disk"):
        return text
    if not text.isdecimal():
        raise ValueError(f"{name!r} is no device; cpu, disk, cuda:0, cuda:1 ...")
    return int(text)


def _part(parameter: str) -> str:
    """The part of the model that a parameter moves with: its block, or what stands at the top."""
    names = parameter.split(".")
    return ".".join(names[:2]) if names[0] == "blocks" else names[0]


def _parts(model: GPT) -> Iterator[tuple[str, list[nn.Parameter]]]:
    found: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(_part(name), []).append(p)
    yield from found.items()


def _fill(model: GPT, weights: Path, layout: dict[str, Device]) -> None:
    """Give the parameters that are not to stay on disk their values, one tensor at a time."""
    with safe_open(weights, framework="pt") as file:
        there = set(file.keys())
        wanted = dict(model.named_parameters())  # a tied tensor comes once, under the embedding's name
        if there != set(wanted):
            raise RuntimeError(f"missing {sorted(set(wanted) - there)}, unexpected {sorted(there - set(wanted))}")
        for name, p in wanted.items():
            if list(p.shape) != file.get_slice(name).get_shape():
                raise RuntimeError(f"size mismatch for {name}")
            device = layout[_part(name)]
            if device != "disk":
                owner, _, leaf = name.rpartition(".")
                value = nn.Parameter(file.get_tensor(name).float().to(device), requires_grad=False)
                setattr(model.get_submodule(owner), leaf, value)
    if model.config.head == "lm" and model.config.tied:
        model.head.weight = model.wte.weight
