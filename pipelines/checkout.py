"""The checkout: where it begins, what its child processes inherit, and who may write in it."""

import fcntl
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.artifact import ForjaError

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
}


class Locked(ForjaError):
    """Another forja command writes in this checkout."""

    exit_code = 4


def set_environment() -> None:
    """No tool that forja starts phones home or unpickles a model. Children inherit it.

    Threads of a computation that wait shall sleep, not spin: where anything else runs on the same cores (Prefect's
    server does) a training step took ten times as long with spinning, and nobody lost anything by sleeping.
    """
    os.environ.update(QUIET)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # libgomp: a glance before they sleep, a sixth faster when alone


def find_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` that holds dvc.yaml; FORJA_ROOT names another one."""
    if named := os.environ.get("FORJA_ROOT"):
        candidates = [Path(named).resolve()]
    else:
        here = (start or Path.cwd()).resolve()
        candidates = [here, *here.parents]
    for folder in candidates:
        if (folder / "dvc.yaml").is_file():
            return folder
    raise ForjaError(f"{candidates[0]}: no dvc.yaml here or above; change to a checkout of forja, or set FORJA_ROOT")


def run_code_of(root: Path) -> None:
    """Run the code of this checkout: when another copy of forja was started (a worktree beside an installed copy),
    start again from the modules that lie in `root`."""
    if Path(__file__).resolve().parents[1] != root and (root / "pipelines" / "cli.py").is_file():
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        os.execv(sys.executable, [sys.executable, "-m", "pipelines.cli", *sys.argv[1:]])  # noqa: S606


def home(root: Path) -> Path:
    """.forja/, which holds everything that depends on when and where."""
    folder = root / ".forja"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def only_writer(root: Path) -> Iterator[None]:
    """Hold the checkout's lock. It is the operating system's, so it ends with its holder, kill -9 included.

    Raises Locked at once, naming the holder.
    """
    with (home(root) / "lock").open("a+", encoding="utf-8") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(f"another forja command writes in {root}: {_holder(root)}; wait for it or end it") from None
        f.seek(0)
        f.truncate()
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        command = shlex.join(["forja", *sys.argv[1:]])
        json.dump({"pid": os.getpid(), "since": now, "command": command}, f)
        f.flush()
        yield


def _holder(root: Path) -> str:
    try:
        held = json.loads((home(root) / "lock").read_text(encoding="utf-8"))
        return f"`{held['command']}`, pid {held['pid']}, since {held['since']}"
    except (OSError, ValueError, KeyError):
        return "it has not yet said who it is"
