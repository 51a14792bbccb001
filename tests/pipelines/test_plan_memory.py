"""What `forja plan` says of memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import status
from pipelines.console import console

ROOT = Path(__file__).parents[2]


def recipe(**more: object) -> dict:
    plain = yaml.safe_load((ROOT / "conf/demo.yaml").read_text())["pretrain"]
    shape = yaml.safe_load((ROOT / "conf/models/demo.yaml").read_text())
    return plain | {"model": shape, "seed": 1} | more


@pytest.mark.parametrize("name, value", [("FORJA_ZERO", "1"), ("FORJA_RANKS", "2"), ("FORJA_PIPELINE", "2")])
def test_no_estimate_of_what_was_not_measured(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert status.estimated_mb(recipe(), 2048) is None


@pytest.mark.parametrize("key, value", [("model", None), ("z_loss", 1e-4), ("packing", "bestfit")])
def test_no_estimate_of_another_loss_or_an_unknown_shape(key: str, value: object) -> None:
    assert status.estimated_mb(recipe(**{key: value}), 2048) is None


def test_smaller_micro_batches_take_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORJA_DEVICE", "cpu")
    whole = status.estimated_mb(recipe(batch=32), 2048)
    monkeypatch.setenv("FORJA_MICRO_BATCH", "4")
    cut = status.estimated_mb(recipe(batch=32), 2048)
    assert whole and cut and 480 < cut < whole - 100


def test_the_table_shows_it_and_a_line_warns_of_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"stage": "pretrain", "action": "run", "reasons": [], "seconds": None, "peak_memory_mb": None}
    for room, warned in ((2000.0, False), (1000.0, True)):
        monkeypatch.setattr(status, "memory_mb", lambda room=room: room)
        with console.capture() as said:
            status.show_plan([entry | {"estimated_mb": 1500.0}])
        text = " ".join(said.get().split())
        assert "1,500 MB" in text
        assert ("pretrain will need about 1,500 MB, and there are 1,000" in text) is warned


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere getrusage's figure is all there is")
def test_a_stage_s_peak_is_not_its_parent_s() -> None:
    held = bytearray(b"x" * 600_000_000)
    asked = "from pipelines.stages import _own_peak; print(_own_peak())"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 20_000 < int(done.stdout) < len(held) // 1024
