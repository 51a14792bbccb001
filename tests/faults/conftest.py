import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.artifact import sha256

HERE = Path(__file__).parent
Break = Callable[[Path, Path, dict[str, Any]], int]


@pytest.fixture(scope="session")
def train_in_child() -> Iterator[Break]:
    """(scratch, out, fault) -> exit code, negative for a signal."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FORJA_")}
    environment |= {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "FORJA_DEVICE": "cpu"}
    with subprocess.Popen(
        [sys.executable, HERE / "training.py"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as p:
        assert p.stdin is not None and p.stdout is not None
        stdin, stdout = p.stdin, p.stdout

        def order(scratch: Path, out: Path, fault: dict[str, Any]) -> int:
            stdin.write(json.dumps({"scratch": str(scratch), "out": str(out), "fault": fault}) + "\n")
            stdin.flush()
            return int(next(line for line in stdout if line.startswith("status ")).split()[1])

        yield order
        stdin.close()


@pytest.fixture(scope="session")
def undisturbed(train_in_child: Break, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The sha256 of what a training that nothing disturbs leaves."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert train_in_child(root / "scratch", root / "out", {}) == 0
    assert json.loads((root / "out" / "steps.json").read_text()) == list(range(1, 12))
    return {name: sha256(root / "out" / name) for name in ("model.safetensors", "metrics.json")}
