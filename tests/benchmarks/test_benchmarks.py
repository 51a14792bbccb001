"""Each benchmark runs, and says one line of JSON with what its README promises. No figure is judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
HH = ROOT / ".." / "shared" / "data" / "hh_rlhf"
SHAKESPEARE = {"ratio", "nats", "goal", "parameters", "steps", "seconds"}
LINES = {
    "pretrain": {
        "ratio",
        "ratio_to_autocast",
        "tokens_per_s",
        "engine_share",
        "peak_gflops",
        "share_of_peak",
        "rounds",
    },
    "generate": {"ratio", "recompute-2"},
    "ppo": {"ratio", "ratios", "seconds", "shares", "rounds"},
    "evaluate": {"ratio", "many", "one", "one-alone"},
    "memory": {"ratio", "bytes_per_parameter", "cases"},
    "encode": {"ratio", "mb_per_cpu_s", "packing"},
    "data --only encoding near_duplicates cleaning": {"ratio", "encoding", "near_duplicates", "cleaning"},
    "shakespeare --part a": SHAKESPEARE | {"ratio_fastest_tenth", "plain_nats", "plain_steps", "plain_seconds"},
    "shakespeare --part b": SHAKESPEARE,
}


def run(command: str) -> subprocess.CompletedProcess[str]:
    name, *arguments = command.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = [sys.executable, f"benchmarks/{name}.py", *arguments]
    return subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", LINES)
def test_one_line_with_the_documented_keys(command: str) -> None:
    said = run(f"{command} --smoke")
    assert said.returncode == 0, said.stderr[-2000:]
    (line,) = said.stdout.splitlines()
    row = json.loads(line)
    assert row["benchmark"] == command.split()[0] and row["smoke"] is True
    assert set(row) >= LINES[command]
    assert row["ratio"] > 0
    described = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(f"`{key}`" in described for key in LINES[command])


@pytest.mark.nightly
@pytest.mark.skipif(not HH.is_dir(), reason="../shared/data/hh_rlhf is absent")
def test_hh_rlhf_from_text_to_verdicts() -> None:
    said = run("hh_rlhf --smoke --folds 2")
    assert said.returncode == 0, said.stderr[-2000:]
    row = json.loads(said.stdout)
    assert row["longer_chosen"] == 0.4433 and row["interval"][0] < row["accuracy"] < row["interval"][1]
    described = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(f"`{key}`" in described for key in row.keys() - {"benchmark", "smoke"})


@pytest.mark.nightly
def test_a_second_ingest_and_validate_open_no_raw_file() -> None:
    said = run("data --smoke --only second_run")
    assert said.returncode == 0, said.stderr[-2000:]
    found = json.loads(said.stdout)["second_run"]
    assert found["first"]["opened_raw"] >= 8 and found["first"]["opened_data"] > 0
    assert found["second"]["opened_raw"] == found["second"]["opened_data"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which is what this one says is missing")
def test_gpu_without_one_says_so() -> None:
    said = run("gpu")
    assert said.returncode == 1 and not said.stdout
    assert said.stderr.splitlines()[-1].startswith("no GPU that PyTorch can use")


def test_gpu_tiny_on_a_cpu_trains_and_decodes_and_claims_nothing() -> None:
    said = run("gpu --device cpu --tiny --steps 3 --only 124m offload decode")
    assert said.returncode == 0, said.stderr[-2000:]
    row = json.loads(said.stdout.splitlines()[-1])
    assert row["ratio"] is None and row["tiny"] is True and "mfu" not in row["124m"]
    assert row["124m"]["losses"] == pytest.approx(row["offload"]["losses"], abs=1e-3)
    assert row["decode"]["token_s"] > 0


@pytest.mark.nightly
def test_rlhf_from_text_to_curves(tmp_path: Path) -> None:
    said = run(f"rlhf --smoke --seeds 1 --work {tmp_path / 'work'} --page {tmp_path / 'page.html'}")
    assert said.returncode == 0, said.stderr[-2000:]
    row = json.loads(said.stdout)
    (seed,) = row["seeds"]
    assert all(0 <= seed[name][how] <= 1 for name in ("sft", "ppo", "grpo") for how in ("sampled", "greedy"))
    assert row["least_gain"] == round(min(seed[n]["sampled"] - seed["sft"]["sampled"] for n in ("ppo", "grpo")), 4)
    assert (tmp_path / "page.html").read_text().count("<figure") == 1
