"""Child processes that never outlive their parent.

A process that dies by SIGKILL cannot tidy up, so the kernel is asked to: PR_SET_PDEATHSIG sends the child SIGTERM when
its parent dies. `python -m pipelines.child PID COMMAND...` sets it and becomes COMMAND.
"""

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """SIGTERM comes when the parent dies; ends at once when `parent` had died before this was asked for."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(143)


def bound(command: list[str]) -> list[str]:
    """`command`, wrapped so that it dies with the process that starts it."""
    return [sys.executable, "-m", "pipelines.child", str(os.getpid()), *command]


def stream(
    command: list[str],
    cwd: Path,
    env: dict[str, str],
    line: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
) -> int:
    """Run `command` in a session of its own, hand each line of its output to `line`, call `tick` about four times a
    second, and return its exit status. When this process is interrupted, the command's whole tree ends first.
    """
    p = subprocess.Popen(  # noqa: S603
        bound(command),
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pump, args=(p, lines), daemon=True).start()
    try:
        while True:
            try:
                text = lines.get(timeout=0.25)
            except queue.Empty:
                tick()
                continue
            if text is None:
                return p.wait()
            line(text)
    finally:
        if p.poll() is None:
            end_tree(p)


def _pump(p: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert p.stdout is not None  # noqa: S101
    for text in p.stdout:
        lines.put(text.rstrip())
    lines.put(None)


def end_tree(p: subprocess.Popen[str] | subprocess.Popen[bytes], grace: float = 10) -> None:
    """SIGTERM for `p` and all its descendants, SIGKILL for those that stay longer than `grace` seconds."""
    import psutil

    try:
        tree = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for signal_them in (psutil.Process.terminate, psutil.Process.kill):
        for process in tree:
            if process.is_running():
                signal_them(process)
        _, tree = psutil.wait_procs(tree, timeout=grace)
    p.wait()


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606
