"""Two stages on two ranks against a plain loop: the same losses, norms and weights, and a checkpoint for either."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ranks_pipeline import loop
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from components.artifact import ForjaError
from components.log import silent
from components.model.engine import Engine
from components.model.gpt import GPT, GPTConfig
from components.model.optim import Optim, schedule
from components.model.pipeline import Pipeline
from components.model.scratch import Saver
from components.train import pretrain

ROOT = Path(__file__).parents[2]
OPTIM = {
    "lr": 1e-2,
    "matrix_lr": None,
    "lr_floor": 0.1,
    "warmup": 2,
    "decay": 0.5,
    "weight_decay": 0.1,
    "beta2": 0.95,
    "clip": 0.5,
    "schedule": "wsd",
    "ema": None,
    "precision": "fp32",
}


def torchrun(script: Path, *arguments: str, ranks: int = 2, **more: str) -> None:
    """`script` on some ranks over gloo on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FORJA_DEVICE": "cpu"} | more
    env |= {"GLOO_SOCKET_IFNAME": "lo"}
    command += [str(script), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def windows(step: int, n: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(step).integers(0, 40, (n, 17)))


def nats(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def plain(config: GPTConfig, optim: Optim) -> tuple[GPT, list[float], list[float], list[float]]:
    """The same training of the undivided model without DeepSpeed: losses, norms and the held-out nats after step 3."""
    torch.manual_seed(0)
    model = GPT(config)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    losses, norms, held = [], [], []
    for step in range(12):
        for group in adamw.param_groups:
            group["lr"] = optim.lr * schedule(optim, step, 12)
        loss = nats(model, windows(step)) / 128
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)))
        adamw.step()
        adamw.zero_grad()
        losses.append(float(loss.detach()))
        if step == 2:
            held.append(float(nats(model, windows(99, 3)).detach()))
    return model, losses, norms, held


@pytest.fixture(scope="module")
def configs() -> dict[str, GPTConfig]:
    """`tiny` has its head tied to the embedding, on the other stage; `modern` has not, but rotary positions and smear.

    The norm of modern's gradient rises above 1, where DeepSpeed would clip by itself.
    """
    preset = yaml.safe_load((ROOT / "conf/models/gpt.yaml").read_text())
    small = {"context": 32, "layers": 4, "width": 16, "heads": 2, "kv_heads": 2, "head_width": 8, "mlp_width": 64}
    heirs = {"norm": "rms", "positions": "rotary", "activation": "swiglu", "qk_norm": True, "bias": "none"}
    heirs |= {"smear": True, "tied": False, "kv_heads": 1}
    of = {"tiny": small, "modern": small | heirs}
    return {name: GPTConfig(**preset | shape, vocab_size=40, head="lm") for name, shape in of.items()}


@pytest.fixture(scope="module")
def staged(configs: dict[str, GPTConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave."""
    out = tmp_path_factory.mktemp("stages")
    task = json.dumps({"configs": {name: c.model_dump() for name, c in configs.items()}, "optim": OPTIM})
    torchrun(Path(__file__).with_name("ranks_pipeline.py"), task, str(out), FORJA_PIPELINE="2", FORJA_MICRO_BATCH="2")
    return out


@pytest.mark.parametrize("which", ["tiny", "modern"])
def test_two_stages_are_one_rank(which: str, configs: dict[str, GPTConfig], staged: Path) -> None:
    config, optim = configs[which], Optim.model_validate(OPTIM)
    losses, norms, held, parameters = json.loads((staged / which / "said.json").read_bytes())
    model, *want = plain(config, optim)
    assert losses == pytest.approx(want[0], abs=1e-5)
    assert norms == pytest.approx(want[1], rel=1e-3)
    assert held == pytest.approx(want[2], rel=1e-5)
    assert parameters < 0.7 * sum(p.numel() for p in model.parameters())  # the first stage's
    got = load_file(staged / which / "model.safetensors")
    for name, p in model.state_dict().items():  # AdamW takes rounding for a direction where the gradient is nothing
        torch.testing.assert_close(got[name], p, rtol=0, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}")

    # Its checkpoint goes on without stages.
    torch.manual_seed(1)
    one = Engine(GPT(config), optim, 8)
    with Saver(staged / which / "scratch", {"model": one}) as saver:
        state = saver.resume()
    assert state == {"step": 6}
    for step in range(6, 12):
        one.set_rate(schedule(optim, step, 12))
        one.step(nats(one.ds, windows(step)), 128)
        assert one.sums["loss"] / 128 == pytest.approx(losses[step], abs=1e-5)


def test_the_loop_asks_for_stages(configs: dict[str, GPTConfig], staged: Path, tmp_path: Path) -> None:
    """The losses, norms and held-out losses that `fit` logs after it was broken off and gone on."""
    got = json.loads((staged / "rows.json").read_bytes())
    want = loop(configs["modern"], Optim.model_validate(OPTIM), tmp_path, staged=False)
    assert len(want) == 4 and len(got) == 4
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() - {"perf/items_per_s"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3 if key == "grad_norm" else 1e-5)


def test_what_cannot_be_had_is_said(configs: dict[str, GPTConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    optim = Optim.model_validate(OPTIM)

    def refused(said: str, recipe: Optim = optim, **environment: str) -> None:
        with monkeypatch.context() as patch, pytest.raises(ForjaError, match=said):
            for name, value in environment.items():
                patch.setenv(name, value)
            Pipeline(GPT(configs["tiny"]), recipe, 8)

    two = {"FORJA_PIPELINE": "2", "WORLD_SIZE": "2"}
    refused("FORJA_PIPELINE=2 on 1 rank.* set FORJA_RANKS=2", FORJA_PIPELINE="2")
    refused("FORJA_PIPELINE=two: is no number", FORJA_PIPELINE="two")
    refused("FORJA_PIPELINE=8: the model has 4 blocks", FORJA_PIPELINE="8", WORLD_SIZE="8")
    refused("set ema=null", optim.model_copy(update={"ema": 0.9}), **two)
    refused("not together with FORJA_ZERO", FORJA_ZERO="1", **two)
    refused("not together with FORJA_COMPILE", FORJA_COMPILE="1", **two)


@pytest.mark.parametrize("change", [{"packing": "bestfit"}, {"z_loss": 1e-4}])
def test_pretraining_by_stages_takes_plain_windows(
    change: dict, configs: dict[str, GPTConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {k: v for k, v in configs["tiny"].model_dump().items() if k not in ("vocab_size", "head")}
    keys = {"seed": 0, "steps": 1, "batch": 8, "eval_every": 1, "save_every": 1, "val_windows": 1, "samples": []}
    keys |= {"model": shape, "init": None, "context": None, "packing": "stream", "z_loss": 0.0}
    cfg = pretrain.Config.model_validate(OPTIM | keys | change)
    letters = {f"t{i}": i for i in range(40)}
    Tokenizer(models.WordLevel(letters, "t0")).save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setenv("FORJA_PIPELINE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ForjaError, match="FORJA_PIPELINE=2: needs packing=stream and z_loss=0"):
        pretrain.run(cfg, tmp_path, tmp_path, tmp_path, silent)
