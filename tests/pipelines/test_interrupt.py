"""kill -9 in the middle of training: the same command goes on, and ends in the bytes of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cloned import SMOKE, clone_to, environment, forja, last_run


def kill_in(clone: Path, stage: str) -> None:
    """Start a run and kill it, with nothing but SIGKILL, once `stage` has written a checkpoint."""
    command = [sys.executable, "-m", "pipelines.cli", "run", *SMOKE]
    with subprocess.Popen(command, cwd=clone, env=environment(clone), stdout=subprocess.DEVNULL) as p:
        while p.poll() is None and not list(clone.glob(f"scratch/{stage}-*/step-*/record.json")):
            time.sleep(0.05)
        assert p.poll() is None, f"the run ended before {stage} was seen"
        os.kill(p.pid, signal.SIGKILL)


@pytest.mark.nightly
def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    undisturbed, killed = clone_to(tmp_path / "undisturbed"), clone_to(tmp_path / "killed")
    forja(undisturbed, "run", *SMOKE)
    for stage in ("pretrain", "ppo"):
        kill_in(killed, stage)
    forja(killed, "run", *SMOKE)
    locks = [yaml.safe_load((clone / "dvc.lock").read_text()) for clone in (undisturbed, killed)]
    assert locks[0] == locks[1]
    assert last_run(killed)["verdict"] == "promote"
    for stage in ("pretrain", "ppo"):
        (diary,) = (killed / ".forja" / "stages").glob(f"{stage}-*")
        begun = json.loads((diary / "spool.jsonl").read_text().partition("\n")[0])["t"]
        assert begun < json.loads((diary / "run.json").read_text())["started"]  # rows of the killed run, gone on with
