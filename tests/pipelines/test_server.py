"""Prefect's server of a run: what was logged is in its database even where the run is ended from outside."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INTERRUPTED = """
import sys
from pathlib import Path
from pipelines.server import prefect_api
with prefect_api(Path(sys.argv[1])) as wait:
    from prefect import flow
    from prefect.logging import get_run_logger
    wait()
    @flow
    def ended():
        for i in range(50):
            get_run_logger().info("line %d", i)
        raise SystemExit(143)
    ended()
"""


@pytest.mark.nightly
def test_what_an_interrupted_run_logged_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    monkeypatch.setenv("PREFECT_LOGGING_TO_API_BATCH_INTERVAL", "60")  # nothing has been sent when the end comes
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 143 and "Error logging to API" not in done.stderr
    with sqlite3.connect(tmp_path / ".forja" / "prefect" / "prefect.db") as database:
        [(lines,)] = database.execute("select count(*) from log where message like 'line %'").fetchall()
    assert lines == 50
