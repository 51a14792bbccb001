"""Pieces of work by datatrove: the same files by Ray as by this process, and what is handed to Slurm."""

import json
import os
import stat
from pathlib import Path
from typing import NamedTuple

import pytest

from components.artifact import ForjaError
from components.data import cluster, ingest, tokenize
from components.data.spread import HERE, Executor, each
from components.log import silent

pytest.importorskip("datatrove", reason="datatrove comes with forja[cluster]")
RAY = HERE.model_copy(update={"kind": "ray", "workers": 2, "memory_gb": 1})
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


def ingested(source: Path, out: Path, executor: Executor) -> dict[str, bytes]:
    """Every file that ingest makes of a folder."""
    wanted = {"licences": None, "exclude_sources": [], "exclude_ids": None, "package": None, "limit": None}
    cfg = {"sources": [{"source": str(source)}], **wanted, "seed": 1, "problems": 0}
    ingest.ingest(ingest.Config.model_validate(cfg), out, silent, executor=executor)
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def tokenized(validate: Path, out: Path, executor: Executor) -> dict[str, bytes]:
    cfg = tokenize.Config(vocab_size=300, min_frequency=1, sample_mb=1, tokenizer=None)
    out.mkdir()
    metrics = tokenize.run(cfg, validate, out, silent, executor=executor)
    made = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    return made | {"metrics": json.dumps(metrics).encode()}


def by_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: dict[str, Executor]) -> None:
    """Ingest's and tokenize's files, made by this process alone and by `others`, are the same bytes."""
    monkeypatch.setattr("components.data.ingest.TOGETHER", 1)  # each file is a piece
    monkeypatch.setattr("components.data.tokenize.SIZE", 700)
    (source := tmp_path / "mine").mkdir()
    for name in "abc":
        rows = [json.dumps({"text": f"Año {i} of {name}: ¡hola!\U0001f600", "lang": "es"}) for i in range(4)]
        (source / f"{name}.jsonl").write_text("\n".join([*rows, "{broken"]), encoding="utf-8")
    (source / "q.jsonl").write_text('{"question": "Why?", "answer": "So."}\n', encoding="utf-8")
    whole = ingested(source, tmp_path / "one", HERE.model_copy(update={"workers": 1}))
    assert [x for x in whole if x.startswith("corpus/")] == [f"corpus/mine/0000{i}.jsonl" for i in range(3)]
    assert whole["quarantine.jsonl"].count(b"\n") == 3
    (validate := tmp_path / "validate").mkdir()
    with (validate / "corpus.jsonl").open("w", encoding="utf-8") as f:
        for i in range(40):
            row = {"text": f"Document {i}: año \u2028 42", "lang": "en", "split": ("train", "val", "test")[i // 5 % 3]}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    (validate / "instructions.jsonl").touch()
    packed = tokenized(validate, tmp_path / "packed", HERE.model_copy(update={"workers": 1}))
    assert packed["test.txt"].decode().split("\n\n")[0] == "Document 10: año \u2028 42"
    for name, executor in others.items():
        assert ingested(source, tmp_path / f"ingest-{name}", executor) == whole, name
        assert tokenized(validate, tmp_path / f"tokenize-{name}", executor) == packed, name


def test_ingest_and_tokenize_give_the_same_bytes_by_slurm(
    tmp_path: Path, fake_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_each(tmp_path, monkeypatch, {"two": HERE.model_copy(update={"workers": 2}), "slurm": SLURM})


@pytest.mark.nightly
def test_ingest_and_tokenize_give_the_same_bytes_by_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray comes with forja[cluster]")
    by_each(tmp_path, monkeypatch, {"ray": RAY})
