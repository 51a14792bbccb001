"""What a second run reads: the files that forja's processes open, told by an audit hook in each of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ("pipelines.cli use conf/demo.yaml", "pipelines.cli ingest raw", "dvc repro validate")
HOOK = """
import os, sys
def _tell(event, args, at=os.environ["OPENED"]):
    if event == "open" and isinstance(args[0], (str, bytes)) and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        name = os.path.abspath(os.fsdecode(args[0]))
        if name.startswith(os.environ["WATCHED"]):
            line = os.open(at, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(line, (name + "\\n").encode())
            os.close(line)
sys.addaudithook(_tell)
"""


def opened(folder: Path, texts: list[str], files: int) -> dict[str, dict[str, int]]:
    """COMMANDS twice in a checkout of its own. For each time: how many files of the raw folder and of data/ were
    opened, by forja or by DVC, and their bytes."""
    checkout, raw, hook = folder / "checkout", folder / "checkout" / "raw", folder / "hook"
    for part in ("components", "pipelines", "conf"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / part, checkout)
    (checkout / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", checkout / ".dvc")
    raw.mkdir()
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    command = hook / "forja"  # as dvc.yaml calls it
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipelines.cli "$@"\n')
    command.chmod(0o755)
    for i in range(files):
        (raw / f"{i:03d}.txt").write_text("\n\n".join(texts[i::files]), encoding="utf-8")
    found = {}
    for turn in ("first", "second"):
        log = folder / f"opened-{turn}"
        log.touch()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(hook), str(checkout), *sys.path[1:]]),
            "OPENED": str(log),
            "WATCHED": str(checkout),
            "PATH": os.pathsep.join([str(hook), os.environ["PATH"]]),
        }
        for command in COMMANDS:
            done = subprocess.run(  # noqa: S603
                [sys.executable, "-m", *command.split()],
                cwd=checkout,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"{command}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        names = log.read_text().splitlines()
        found[turn] = {
            f"{what}_{part}": count
            for part, under in (("raw", raw), ("data", checkout / "data"))
            for what, count in _counted([Path(n) for n in names if Path(n).is_relative_to(under)]).items()
        }
    return found


def _counted(paths: list[Path]) -> dict[str, int]:
    there = [path for path in paths if path.is_file()]
    return {"opened": len(there), "bytes": sum(path.stat().st_size for path in there)}
