"""Artifacts: a folder of files, and record.json beside them, written last.

A folder without a record that matches its files does not exist for its readers. The record holds what the folder is
(stage, recipe, code, inputs: together the fingerprint), what it measured, and the sha256 of every file. It holds no
time, host or run id, so one recipe on one machine gives one record, byte for byte.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel

RECORD = "record.json"


class ForjaError(Exception):
    """A user's mistake or a broken input: one line that names the file or key, the reason and the mend."""

    exit_code = 2


class Damaged(ForjaError):
    """An artifact or checkpoint whose bytes are not the recorded ones."""


class Record(BaseModel, frozen=True, extra="forbid"):
    """What record.json says. `inputs` maps an input's name to the digest of its own record."""

    stage: str
    fingerprint: str
    config: dict[str, Any]
    code: str
    inputs: dict[str, str]
    metrics: dict[str, float]
    files: dict[str, str]


def to_json(value: Any) -> str:
    """Canonical JSON: sorted keys, two spaces, UTF-8, no NaN. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fingerprint(stage: str, config: dict[str, Any], code: str, inputs: dict[str, str]) -> str:
    """The identity of a result before it is computed: 16 hex digits over stage, recipe, code and inputs."""
    identity = to_json({"stage": stage, "config": config, "code": code, "inputs": inputs})
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def digest(folder: Path) -> str:
    """The identity of a finished folder: sha256 of its record, which holds the sha256 of every file."""
    try:
        return sha256(folder / RECORD)
    except FileNotFoundError:
        raise Damaged(f"{folder}: no {RECORD}, so the folder was never finished; run the stage that makes it") from None


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / RECORD)


def write_record(
    folder: Path,
    stage: str,
    *,
    config: dict[str, Any] | None = None,
    code: str = "",
    inputs: dict[str, str] | None = None,
    metrics: dict[str, float] | None = None,
    known: dict[str, str] | None = None,
) -> Record:
    """Seal `folder`: hash every file, flush it to disk, then write the record under its final name.

    `known` maps files whose sha256 was taken as they were written, and which are flushed, to it; they are not read.
    Raises ValueError when a metric is NaN or infinite: such a result is not sealed.
    """
    config, inputs, metrics, known = config or {}, inputs or {}, metrics or {}, known or {}
    names = {p.relative_to(folder).as_posix(): p for p in files_of(folder)}
    files = {name: known.get(name) or sha256(p) for name, p in names.items()}
    record = Record(
        stage=stage,
        fingerprint=fingerprint(stage, config, code, inputs),
        config=config,
        code=code,
        inputs=inputs,
        metrics=metrics,
        files=files,
    )
    text = to_json(record.model_dump())
    for name, p in names.items():
        if name not in known:
            _fsync(p)
    write_atomic(folder / RECORD, text)
    return record


def read_record(folder: Path, verify: bool = True) -> Record:
    """The record of `folder`. With `verify`, every file is hashed and compared; extra and missing files count too.

    Raises Damaged, naming the first file that differs.
    """
    path = folder / RECORD
    if not path.is_file():
        raise Damaged(f"{folder}: no {RECORD}, so the folder was never finished; run the stage that makes it")
    try:
        record = Record.model_validate_json(path.read_bytes())
    except ValueError as e:
        raise Damaged(f"{path}: not a record ({str(e).splitlines()[0]}); delete {folder} and run its stage") from e
    if verify:
        present = {p.relative_to(folder).as_posix() for p in files_of(folder)}
        for name in sorted(present ^ set(record.files)):
            state = "not in the record" if name in present else "missing"
            raise Damaged(f"{folder / name}: {state}; delete {folder} and run its stage")
        for name, want in record.files.items():
            if sha256(folder / name) != want:
                raise Damaged(f"{folder / name}: its bytes are not the recorded ones; delete {folder}, run its stage")
    return record


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well, and vanishes when it does not."""
    temporary = begin(out)
    try:
        yield temporary
        finish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def begin(out: Path) -> Path:
    """An empty temporary folder beside `out`, for `finish`."""
    temporary = out.with_name(f".{out.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def finish(temporary: Path, out: Path) -> None:
    """Give `temporary` the name `out`, in place of whatever had it."""
    if out.exists():
        shutil.rmtree(out)
    os.replace(temporary, out)
    _fsync(out.parent)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
