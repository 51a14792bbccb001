import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.artifact import ForjaError
from pipelines.checkout import Locked, find_root, only_writer

HOLD = """
import sys, time
from pathlib import Path
from pipelines.checkout import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(root)]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert p.stdout is not None and p.stdout.readline() == "held\n"
    return p


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as p:
        with pytest.raises(Locked, match=f"pid {p.pid}") as e, only_writer(tmp_path):
            pass
        assert e.value.exit_code == 4
        p.kill()


def test_the_lock_ends_with_its_holder(tmp_path: Path) -> None:
    with holder(tmp_path) as p:
        p.kill()
    with only_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".forja" / "lock").read_text()
    with only_writer(tmp_path):
        pass


def test_the_root_is_found_from_below_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORJA_ROOT", raising=False)
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(ForjaError, match=r"no dvc\.yaml"):
        find_root(tmp_path / "a" / "b")
    (tmp_path / "dvc.yaml").touch()
    assert find_root(tmp_path / "a" / "b") == tmp_path
    monkeypatch.setenv("FORJA_ROOT", str(tmp_path))
    assert find_root(Path("/")) == tmp_path


PARENT = """
import subprocess, sys
from pipelines.child import bound
p = subprocess.Popen(bound([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]))
print(p.pid, flush=True)
p.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_a_child_dies_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout is not None
        assert int(p.stdout.readline()) > 0
        assert p.stdout.readline() == "up\n"
        os.kill(p.pid, signal.SIGKILL)
        p.wait()
        assert p.stdout.read() == ""  # ends when the child, which holds the pipe too, is gone


def test_an_interrupted_stream_ends_the_whole_tree(tmp_path: Path) -> None:
    import psutil

    from pipelines.child import stream

    class Stop(Exception):
        pass

    def tick() -> None:
        raise Stop

    lines: list[str] = []
    before = set(psutil.Process().children(recursive=True))  # other tests' helpers, such as a resource tracker
    script = "import subprocess, sys; print('up', flush=True); subprocess.run(['sleep', '60'])"
    with pytest.raises(Stop):
        stream([sys.executable, "-c", script], tmp_path, {}, lines.append, tick)
    for _ in range(100):
        now = set(psutil.Process().children(recursive=True)) - before
        if not [c for c in now if c.status() != psutil.STATUS_ZOMBIE]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("a descendant is still there")


def test_a_stream_gives_lines_and_the_exit_status(tmp_path: Path) -> None:
    from pipelines.child import stream

    lines: list[str] = []
    status = stream(["sh", "-c", "echo one; echo two >&2; echo $WORD; exit 3"], tmp_path, {"WORD": "x"}, lines.append)
    assert (status, lines) == (3, ["one", "two", "x"])
