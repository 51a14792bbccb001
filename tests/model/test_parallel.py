"""A model over several devices: where its parts go, that its numbers stay the same, and what it takes in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from components.artifact import ForjaError
from components.model import checkpoint, parallel
from components.model.generate import generate
from components.model.gpt import GPT, GPTConfig, KVCache
from components.model.losses import token_logprobs

ROOT = Path(__file__).parents[2]


def saved(config: GPTConfig, folder: Path) -> GPT:
    model = GPT(config).eval()
    tokenizer = folder.parent / "tokenizer.json"
    Tokenizer(models.BPE()).save(str(tokenizer))
    checkpoint.save(model, folder, tokenizer)
    return model


def divided(folder: Path, monkeypatch: pytest.MonkeyPatch, layout: dict) -> GPT:
    path = folder.parent / "map.json"
    path.write_text(json.dumps(layout))
    monkeypatch.setenv("FORJA_DEVICE_MAP", str(path))
    return checkpoint.load(folder).model


@pytest.mark.parametrize("which", ["tiny", "modern"])
def test_memory_and_disk_give_the_same_bits(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: GPTConfig = request.getfixturevalue(which)
    monkeypatch.setenv("FORJA_DEVICE", "cpu")
    saved(config, tmp_path / "model")
    whole = checkpoint.load(tmp_path / "model").model
    model = divided(tmp_path / "model", monkeypatch, {"": "cpu", "blocks.1": "disk"})
    assert model.blocks[0].mlp.up.weight.device.type == "cpu"
    assert {p.device.type for p in model.blocks[1].parameters()} == {"meta"}
    assert (model.head.weight is model.wte.weight) == config.tied
    ids = torch.randint(0, 40, (3, 12))
    with torch.no_grad():
        want = whole(ids)
        assert torch.equal(model(ids), want)
        caches = [KVCache(config, 3, 12, m.wte.weight) for m in (whole, model)]
        for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:]):
            a, b = (m(part, cache=c) for m, c in zip((whole, model), caches, strict=True))
            assert torch.equal(a, b)
    assert {p.device.type for p in model.blocks[1].parameters()} == {"meta"}  # gone again once they were used
    texts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    for a, b in zip(token_logprobs(whole, texts, 0), token_logprobs(model, texts, 0), strict=True):
        assert torch.equal(a, b)
    asked = {"max_new_tokens": 6, "stop": 0, "temperature": 1.0, "seed": 3}
    assert generate(model, texts, **asked) == generate(whole, texts, **asked)


def test_a_caller_who_names_a_device_gets_the_whole(
    tiny: GPTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tiny, tmp_path / "model")
    monkeypatch.setenv("FORJA_DEVICE_MAP", "auto")
    model = checkpoint.load(tmp_path / "model", "cpu").model
    assert not parallel.divided(model) and not any(p.is_meta for p in model.parameters())


def test_the_computed_map_fills_the_devices_in_order(tiny: GPTConfig) -> None:
    """By hand. A block of the tiny model holds 4 * 16 * 16 + 2 * 16 * 64 weights, 3 * 16 + 16 + 64 + 16 biases and
    2 * 2 * 16 of its norms: 3,280 floats. Outside: 40 * 16 + 32 * 16 + 2 * 16 = 1,184, the head being tied."""
    config = tiny.model_copy(update={"layers": 6})
    model = checkpoint.hollow(config)
    block, outer = 4 * 3280, 4 * 1184

    def places(memory: str) -> list:
        found = parallel.computed(model, memory)
        assert found["wte"] == found["head"] == found["norm"] == (0 if "cuda" in memory else "cpu")
        return [found[f"blocks.{i}"] for i in range(6)]

    # Two blocks, and room for one that comes from disk.
    assert places(f"cpu={outer + 3 * block}") == ["cpu"] * 2 + ["disk"] * 4
    assert places(f"cpu={outer + 7 * block}") == ["cpu"] * 6
    assert places(f"cuda:0={outer + 2 * block},cuda:1={2 * block},cpu={2 * block}") == [0, 1, 1, "cpu", "disk", "disk"]
    with pytest.raises(ForjaError, match="one block at a time take 0 MB"):
        places(f"cpu={outer + block - 1}")


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"blocks": "cpu"}, "says nothing of wte"),
        ({"": "disk"}, "not the disk"),
        ({"": "cpu", "head": 0}, "go to one device"),
        ({"": "cpu", "blocks.1": 0}, "put wte on the first GPU"),
        ({"": "gpu"}, "no device"),
        (["cpu"], "name `auto` or a JSON file"),
    ],
)
def test_a_map_that_does_not_serve_is_refused(layout: object, reason: str, tiny: GPTConfig, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(layout))
    with pytest.raises(ForjaError, match=reason):
        parallel.given(checkpoint.hollow(tiny), path)


@pytest.mark.parametrize("memory", ["cpu", "cpu=", "gpu=1GB", "disk=1GB", "cpu=many"])
def test_limits_that_say_nothing_are_refused(memory: str, tiny: GPTConfig) -> None:
    with pytest.raises(ForjaError, match="FORJA_MEMORY"):
        parallel.computed(checkpoint.hollow(tiny), memory)


LOADED = """
import hashlib, json, re, sys
import accelerate, torch, torch._dynamo  # what stands in memory whatever the model
from pathlib import Path
from components.model import checkpoint
ids = torch.arange(24).view(2, 12)
def resident():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = resident()
with torch.no_grad():
    logits = checkpoint.load(Path(sys.argv[1])).model(ids)
print(json.dumps([resident() - before, hashlib.sha256(logits.numpy().tobytes()).hexdigest()]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_a_model_larger_than_its_memory(tiny: GPTConfig, tmp_path: Path) -> None:
    """A process that may hold 60 MB of a model of 228 MB takes less than half of the model, and says the same."""
    big = {"layers": 8, "width": 768, "heads": 12, "kv_heads": 12, "head_width": 64, "mlp_width": 3072}
    config = tiny.model_copy(update=big)
    Tokenizer(models.BPE()).save(str(tmp_path / "own.json"))
    weights = {name: torch.empty(shape).normal_(std=0.02) for name, shape in checkpoint.shapes_of(config).items()}
    (tmp_path / "model").mkdir()
    save_file(weights, tmp_path / "model" / checkpoint.WEIGHTS)
    (tmp_path / "model" / checkpoint.SHAPE).write_text(config.model_dump_json())
    (tmp_path / "model" / checkpoint.TOKENIZER).write_text((tmp_path / "own.json").read_text())

    def taken(**more: str) -> tuple[int, str]:
        env = os.environ | {"PYTHONPATH": str(ROOT), "FORJA_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} | more
        command = [sys.executable, "-c", LOADED, str(tmp_path / "model")]
        return tuple(json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout))

    size = (tmp_path / "model" / checkpoint.WEIGHTS).stat().st_size
    assert size > 225e6
    whole, want = taken()
    little, got = taken(FORJA_DEVICE_MAP="auto", FORJA_MEMORY="cpu=60MB")
    assert got == want
    assert whole > size > 2 * little
