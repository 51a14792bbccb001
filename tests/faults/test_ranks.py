"""Another number of ranks: what one rank saved two go on from, and the other way round, at another ZeRO stage each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import RECIPE, train

from components.log import Metrics
from components.model import muon

HERE = Path(__file__).parent


class Killed(BaseException):
    pass


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_one_rank_and_two_are_the_same_training(
    optimiser: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, Muon's products too: bfloat16 makes more of each last bit."""
    cfg = RECIPE if optimiser == "muon" else RECIPE.model_copy(update={"matrix_lr": None})
    monkeypatch.setattr(muon, "PRODUCTS", torch.float32)
    losses: list[float] = []
    undisturbed, _ = train(tmp_path / "one", lambda row, _: losses.append(row["loss"]), cfg=cfg)

    def kill(_: Metrics, step: int) -> None:
        if step == 7:
            raise Killed

    for zero in "0123":
        monkeypatch.setenv("FORJA_ZERO", str((int(zero) + 1) % 4))
        with pytest.raises(Killed):
            train(tmp_path / f"from-one-{zero}", kill, cfg=cfg)

    environment = {k: v for k, v in os.environ.items() if not k.startswith("FORJA_")}
    environment |= {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "FORJA_DEVICE": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, HERE / "ranks.py", tmp_path, optimiser], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def same(weights: dict[str, torch.Tensor]) -> None:  # AdamW takes even a key bias's rounding for a direction
        for name, p in weights.items():
            torch.testing.assert_close(p, undisturbed[name], atol=1e-3, rtol=0, msg=lambda m, n=name: f"{n}: {m}")

    for zero in "0123":
        assert json.loads((tmp_path / f"whole-{zero}.json").read_text()) == pytest.approx(losses, abs=1e-5)
        assert json.loads((tmp_path / f"from-one-{zero}.json").read_text()) == pytest.approx(losses[6:], abs=1e-5)
        same(load_file(tmp_path / f"whole-{zero}.safetensors"))
        same(load_file(tmp_path / f"from-one-{zero}.safetensors"))
        shards = {p.name for p in (tmp_path / f"from-two-{zero}" / "step-00000010").glob("rank-*")}
        assert shards == {"rank-00000.safetensors", "rank-00001.safetensors"}
        monkeypatch.setenv("FORJA_ZERO", str((int(zero) + 2) % 4))
        steps: list[int] = []
        weights, _ = train(tmp_path / f"from-two-{zero}", lambda _, step, taken=steps: taken.append(step), cfg=cfg)  # type: ignore[misc]
        assert steps == [11]
        same(weights)
