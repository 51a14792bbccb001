"""Pieces of work by datatrove: the same files by Ray as by this process, and what is handed to Slurm."""

import os
import stat
from pathlib import Path
from typing import NamedTuple

import pytest

from components.artifact import ForjaError
from components.data import cluster
from components.data.spread import HERE, each

pytest.importorskip("datatrove", reason="datatrove comes with forja[cluster]")
SLURM = HERE.model_copy(update={"kind": "slurm", "partition": "cpu", "workers": 2, "minutes": 10})
# sbatch that does the tasks of an array itself; the job that sums datatrove's statistics up is no array.
SBATCH = """#!/bin/bash
for script; do :; done
cp "$script" "$(dirname "$0")/script"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
grep -q launch_pickled_pipeline "$script" && for i in $(seq 0 "$last"); do
  SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash "$script" > "$(dirname "$0")/out-$i" 2>&1
done
echo Submitted batch job 7
"""
SRUN = """#!/bin/bash
while [ "$1" != launch_pickled_pipeline ]; do shift; done
exec "$@"
"""


class Double(NamedTuple):
    number: int
    out: Path


def double(job: Double) -> None:
    if job.number < 0:
        raise ForjaError(f"{job.number}: negative; give another")
    (job.out / str(job.number)).write_text(str(2 * job.number), encoding="utf-8")


def made(out: Path) -> dict[str, str]:
    return {p.name: p.read_text(encoding="utf-8") for p in out.iterdir()}


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "sbatch": SBATCH,
        "srun": SRUN,
        "squeue": "#!/bin/bash\n",
        "scontrol": "#!/bin/bash\necho here\n",
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return folder


def test_slurm_is_given_an_array_of_tasks_that_do_the_work(tmp_path: Path, fake_slurm: Path) -> None:
    (out := tmp_path / "out").mkdir()
    jobs = [Double(n, out) for n in (3, 5)]
    assert list(each(double, jobs, SLURM, 0, tmp_path / "logs")) == jobs
    assert made(out) == {"3": "6", "5": "10"}
    script = (tmp_path / "logs" / "double" / "launch_script.slurm").read_text(encoding="utf-8")
    for line in ("array=0-1%2", "partition=cpu", "time=10", "mem-per-cpu=2G", "cpus-per-task=1"):
        assert f"#SBATCH --{line}\n" in script
    assert f'PYTHONPATH="{cluster.ROOT}' in script


def test_what_a_task_says_is_the_error(tmp_path: Path, fake_slurm: Path) -> None:
    (out := tmp_path / "out").mkdir()
    with pytest.raises(ForjaError, match=r"^-1: negative; give another$"):
        list(each(double, [Double(1, out), Double(-1, out)], SLURM, 0, tmp_path / "logs"))


def test_without_slurm_the_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ForjaError, match="no sbatch"):
        list(each(double, [Double(1, tmp_path)], SLURM, 0, tmp_path / "logs"))


@pytest.mark.nightly
def test_ray_does_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray comes with forja[cluster]")
    (out := tmp_path / "out").mkdir()
    ray = HERE.model_copy(update={"kind": "ray", "workers": 2, "memory_gb": 1})
    list(each(double, [Double(n, out) for n in range(5)], ray, 0, tmp_path / "logs"))
    assert made(out) == {str(n): str(2 * n) for n in range(5)}
