import subprocess
import sys
from pathlib import Path

import pytest
from toy import ROOT


def forja(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=None)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['forja', '--help']\n"
        "import pipelines.cli\n"
        "try: pipelines.cli.main()\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'mlflow', 'prefect', 'dvc', 'pandas', 'deepspeed', 'great_expectations'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("run", "plan", "use", "stage", "ingest", "promote", "status", "generate", "report", "ui"):
        assert f" {name} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stage", "pretrian"], ["stage pretrian", "no such stage"]),
        (["plan", "--recipe", "conf/nowhere.yaml"], ["conf/nowhere.yaml", "no such recipe"]),
        (["plan", "--set", "nothing"], ["--set nothing", "no value"]),
        (["generate", "hello", "--model", "nowhere"], ["nowhere"]),
        (["generate", ""], ["PROMPT"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    done = forja(*arguments)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = forja("status", cwd=tmp_path)
    assert done.returncode == 2 and "no dvc.yaml" in done.stderr
