"""Prefect's API: the server that PREFECT_API_URL names, or one of our own on the checkout's database.

Prefect can start a server by itself, but that one outlives a run that is killed. Ours dies with its owner.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from components.artifact import ForjaError
from pipelines.checkout import home
from pipelines.child import bound, end_tree

START_LIMIT = 120.0  # seconds; a slow machine needs 20


class ServerFailed(ForjaError):
    """Prefect's own server does not come up."""

    exit_code = 1


def answers(url: str, path: str = "/health", timeout: float = 5.0) -> bool:
    """Whether a server answers at url + path."""
    if not url.startswith(("http://", "https://")):
        return False
    try:
        with urllib.request.urlopen(url.rstrip("/") + path, timeout=timeout) as reply:  # noqa: S310
            return bool(reply.status == 200)
    except (OSError, ValueError):
        return False


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def prefect_home(root: Path) -> Path:
    """PREFECT_HOME of this checkout; set for this process and its children."""
    folder = Path(os.environ.setdefault("PREFECT_HOME", str(home(root) / "prefect")))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def prefect_api(root: Path) -> Iterator[Callable[[], None]]:
    """Begin a server where none is named, and end it after its last logs are written.

    Yields a function that waits until the server answers, so that other things can start meanwhile.
    """
    folder = prefect_home(root)
    if url := os.environ.get("PREFECT_API_URL"):
        if not answers(url):
            raise ForjaError(f"PREFECT_API_URL={url}: no answer; start that server, or unset the variable")
        yield lambda: None
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    with (folder / "server.log").open("ab") as log:
        p = subprocess.Popen(  # noqa: S603
            bound(prefect_command(port)),
            cwd=root,
            env={**os.environ, "PREFECT_UI_ENABLED": "false", "PREFECT_LOGGING_LEVEL": "WARNING"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    os.environ["PREFECT_API_URL"] = url
    try:
        yield lambda: _wait(p, url, folder / "server.log")
    finally:
        if answers(url):  # of an interrupted run too, what is left is sent
            _drain()
        del os.environ["PREFECT_API_URL"]
        end_tree(p)


def prefect_command(port: int) -> list[str]:
    return [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]


def _wait(p: subprocess.Popen[bytes], url: str, log: Path) -> None:
    begun = time.monotonic()
    while not answers(url, timeout=1.0):
        if p.poll() is not None or time.monotonic() - begun > START_LIMIT:
            raise ServerFailed(f"Prefect's server did not start; {log} says why")
        time.sleep(0.2)


def _drain() -> None:
    """Send what Prefect's background workers still hold."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all()
    EventsWorker.drain_all()
