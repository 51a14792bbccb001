"""The pages of Prefect and MLflow over the past runs of this checkout."""

import os
import subprocess
import sys
import time
from pathlib import Path

from components.artifact import ForjaError
from pipelines.checkout import home
from pipelines.child import bound, end_tree
from pipelines.console import say
from pipelines.server import answers, is_free, prefect_command, prefect_home
from pipelines.track import connect, tracking_uri


def serve(root: Path, prefect_port: int, mlflow_port: int) -> None:
    """Start both servers on 127.0.0.1, say where they are, and end them with Ctrl-C. Raises ForjaError for a port
    that is taken."""
    for option, port in (("--prefect-port", prefect_port), ("--mlflow-port", mlflow_port)):
        if not is_free(port):
            raise ForjaError(f"{option} {port}: another program listens there; choose another port")
    folder = prefect_home(root)
    connect(root)
    own = {"PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{prefect_port}/api"}
    mlflow = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(mlflow_port), "--workers", "1"]
    mlflow += ["--backend-store-uri", tracking_uri(root)]
    servers = [
        (f"http://127.0.0.1:{prefect_port}", "/api/health", prefect_command(prefect_port), folder / "ui.log"),
        (f"http://127.0.0.1:{mlflow_port}", "/health", mlflow, home(root) / "mlflow-ui.log"),
    ]
    children = []
    try:
        for _, _, command, log in servers:
            with log.open("ab") as f:
                p = subprocess.Popen(  # noqa: S603
                    bound(command), cwd=root, env={**os.environ, **own}, stdout=f, stderr=f, start_new_session=True
                )
            children.append(p)
        for (url, health, _, log), p in zip(servers, children, strict=True):
            while not answers(url, health, timeout=1):
                if p.poll() is not None:
                    raise ForjaError(f"{url}: its server ended at once; {log} says why")
                time.sleep(0.2)
        say(f"Prefect  {servers[0][0]}\nMLflow   {servers[1][0]}\nCtrl-C ends both.")
        while all(p.poll() is None for p in children):
            time.sleep(0.5)
        raise ForjaError("a server ended by itself; .forja/prefect/ui.log and .forja/mlflow-ui.log say why")
    except KeyboardInterrupt:
        say("ended")
    finally:
        for p in children:
            end_tree(p)
