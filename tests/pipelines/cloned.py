"""A clone of this checkout to run the real chain in, as a user would."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from toy import ROOT

SMOKE = ("--recipe", "conf/smoke.yaml")


def clone_to(to: Path) -> Path:
    """The files that git tracks or would track, in a repository of their own."""
    to.mkdir(exist_ok=True)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file() and name not in ("params.yaml", "data.dvc", "dvc.lock"):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    subprocess.run(["git", "init", "--quiet"], cwd=to, check=True)
    return to


def environment(clone: Path) -> dict[str, str]:
    """This interpreter's, without what a surrounding run or server may have set."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FORJA_", "MLFLOW_", "PREFECT_", "DVC_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "PATH": path, "PYTHONPATH": str(clone), "FORJA_DEVICE": "cpu"}


def call(clone: Path, *command: str, status: int = 0) -> str:
    """Run a module's command in the clone; its output, once it has ended with `status`."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=clone,
        env=environment(clone),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def forja(clone: Path, *arguments: str, status: int = 0) -> str:
    return call(clone, "pipelines.cli", *arguments, status=status)


def last_run(clone: Path) -> dict[str, Any]:
    runs = [json.loads(p.read_text()) for p in (clone / ".forja" / "runs").glob("*.json")]
    return max(runs, key=lambda run: float(run["started"]))
