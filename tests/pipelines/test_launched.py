"""FORJA_RANKS=2 from the command to the artifact, on the real stage with a toy model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cloned import SMOKE, clone_to, environment, forja
from safetensors.torch import load_file
from torch.testing import assert_close

from components.artifact import read_record, write_record
from components.data import tokenize
from components.log import silent
from components.train import pretrain

TOY = {"context": 32, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, "head_width": 8, "mlp_width": 32}
CHANGES = {"model": "toy", "steps": 6, "batch": 4, "eval_every": 3, "save_every": 2, "val_windows": 2}
CHANGES |= {"precision": "fp32", "matrix_lr": "null"}
FAILS = """
from components.artifact import ForjaError
raise ForjaError("the second rank has had enough")
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout whose next stage is pretrain."""
    clone = clone_to(tmp_path / "clone")
    shape = yaml.safe_load((clone / "conf" / "models" / "demo.yaml").read_text()) | TOY
    (clone / "conf" / "models" / "toy.yaml").write_text(yaml.safe_dump(shape))
    forja(clone, "use", SMOKE[1], *(word for k, v in CHANGES.items() for word in ("--set", f"pretrain.{k}={v}")))
    validated, tokens = tmp_path / "validate", clone / "artifacts" / "tokenize"
    for folder in (validated, tokens):
        folder.mkdir(parents=True)
    rows = [
        {"id": str(i), "lang": "en", "split": ("train", "train", "val", "test")[i % 4], "text": f"Doc {i}. " * 20}
        for i in range(24)
    ]
    (validated / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (validated / "instructions.jsonl").touch()
    cfg = tokenize.Config(vocab_size=300, min_frequency=1, sample_mb=9, tokenizer=None)
    tokenize.run(cfg, validated, tokens, silent)
    write_record(tokens, "tokenize")
    return clone


def stage(clone: Path) -> tuple[int, str, dict[str, Any], Path]:
    """Pretrain on two ranks: the status, what is shown, the end of the diary, and where that is."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "stage", "pretrain"],
        cwd=clone,
        env=environment(clone) | {"FORJA_RANKS": "2", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    (diary,) = (clone / ".forja" / "stages").glob("pretrain-*")
    return done.returncode, done.stdout, json.loads((diary / "run.json").read_text()), diary


def break_second_rank(clone: Path, how: str) -> None:
    """In the clone, after three steps."""
    loop, before = clone / "components" / "train" / "loop.py", "            log(row, done)\n"
    lines = ["if done == 3 and world()[0] == 1:", *(f"    {line}" for line in how.split("\n"))]
    text = loop.read_text()
    assert text.count(before) == 1
    loop.write_text(text.replace(before, "".join(f"            {line}\n" for line in lines) + before))


def test_two_ranks_make_what_one_makes(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, shown, run, diary = stage(clone)
    assert status == 0 and run["status"] == "finished", shown
    out = clone / "artifacts" / "pretrain"
    assert read_record(out).stage == "pretrain"
    steps = [json.loads(line)["step"] for line in (diary / "spool.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]  # rank 0 alone
    assert not list((clone / "scratch").iterdir())

    for name in [n for n in os.environ if n.startswith("FORJA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FORJA_DEVICE", "cpu")
    cfg = pretrain.Config.model_validate(yaml.safe_load((clone / "params.yaml").read_text())["pretrain"])
    alone, scratch = tmp_path / "alone", tmp_path / "scratch"
    alone.mkdir()
    scratch.mkdir()
    metrics = pretrain.run(cfg, clone / "artifacts" / "tokenize", alone, scratch, silent)
    found = json.loads((out / "metrics.json").read_text())
    assert found.keys() == metrics.keys() and found["val_loss"] == pytest.approx(metrics["val_loss"], abs=1e-4)
    wanted = load_file(alone / "model.safetensors")
    for name, p in load_file(out / "model.safetensors").items():
        assert_close(p, wanted[name], atol=1e-3, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.nightly
def test_a_rank_that_fails_is_the_stages_reason(clone: Path) -> None:
    break_second_rank(clone, FAILS)
    status, shown, run, _ = stage(clone)
    reason = "the second rank has had enough"
    assert status == 2 and (run["status"], run["reason"], run["exit_code"]) == ("failed", reason, 2), shown
    assert reason in shown
    assert not (clone / "artifacts" / "pretrain").exists()
    assert list((clone / "scratch").glob("pretrain-*/step-*"))  # where the next start goes on
