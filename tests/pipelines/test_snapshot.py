"""A snapshot of a person's own files: taken once, taken again when they change, told apart, and carried elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from cloned import call, clone_to, forja

from components.data.ingest import Config
from components.data.spread import HERE
from pipelines import dvc, snapshot

RECIPE = """\
ingest:
  sources:
    - {source: mine, licence: CC0-1.0}
    - {source: more.csv}
  licences: null
  exclude_sources: []
  exclude_ids: null
  seed: 0
  package: null
  problems: 0
  limit: null
"""
opened: list[str] = []
listening = False


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    if listening and event == "open" and isinstance(arguments[0], str):
        opened.append(arguments[0])


sys.addaudithook(listen)  # it cannot be taken away again


@contextmanager
def files_read() -> Iterator[list[str]]:
    """The paths that this process opens."""
    global listening  # noqa: PLW0603
    opened.clear()
    listening = True
    try:
        yield opened
    finally:
        listening = False


def rows(clone: Path, table: str) -> list[dict[str, Any]]:
    return [json.loads(x) for p in sorted((clone / "data" / table).rglob("*.jsonl")) for x in p.open("rb")]


def git(clone: Path, *command: str) -> None:
    who = ["-c", "user.email=a@example.org", "-c", "user.name=a"]
    subprocess.run(["git", *who, *command], cwd=clone, check=True, capture_output=True)


def ingest_section(clone: Path) -> dict[str, Any]:
    return dvc.section(clone, "ingest")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    clone = clone_to(tmp_path / "one")
    (clone / "mine").mkdir()
    (clone / "mine" / "a.jsonl").write_text("".join(f'{{"text": "Text number {i}."}}\n' for i in range(1, 6)))
    (clone / "mine" / "b.txt").write_text("One text.\n")
    (clone / "more.csv").write_text("question,answer\nWhat?,That.\n")
    ingest = Config.model_validate(yaml.safe_load(RECIPE)["ingest"]).model_dump(mode="json")
    (clone / "params.yaml").write_text(yaml.safe_dump({"ingest": ingest, "executor": HERE.model_dump()}))
    return clone


def test_the_life_of_a_snapshot(clone: Path, tmp_path: Path) -> None:
    forja(clone, "stage", "ingest")
    assert [r["text"] for r in rows(clone, "corpus")] == [*(f"Text number {i}." for i in range(1, 6)), "One text.\n"]
    assert {(r["source"], r["licence"]) for r in rows(clone, "corpus")} == {("mine", "CC0-1.0")}
    git(clone, "add", "--all")
    git(clone, "commit", "--message", "first")

    # Unchanged files are looked at, not read; touched ones are read, found the same, and then known again.
    mine = str(clone / "mine")
    with files_read() as read:
        assert snapshot.need(clone, ingest_section(clone)).reason.endswith("source files are unchanged: none is read")
    assert read and not [path for path in read if path.startswith(mine) or path.endswith("more.csv")]
    os.utime(clone / "more.csv", ns=(1, 1))
    with files_read() as read:
        assert snapshot.need(clone, ingest_section(clone)).action == "keep"
    assert [path for path in read if path.startswith(mine) or path.endswith("more.csv")] == [str(clone / "more.csv")]
    before = (clone / "data" / "record.json").stat()
    forja(clone, "stage", "ingest")
    assert (clone / "data" / "record.json").stat().st_mtime_ns == before.st_mtime_ns

    # A changed file, a new one and one that went: the reason names the source.
    lines = (clone / "mine" / "a.jsonl").read_text().splitlines()
    lines = ['{"text": "A new first."}', *lines[:2], '{"text": "Another third."}', lines[3], "{broken"]
    (clone / "mine" / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert snapshot.need(clone, ingest_section(clone)) == ("ingest", "mine changed")
    forja(clone, "stage", "ingest")
    assert len(rows(clone, "corpus")) == 6
    found = json.loads(forja(clone, "data", "diff", "--json"))["rows"]
    told = {(r["table"], r["source"]): (r["came"], r["went"], r["changed"]) for r in found}
    # Of the five old texts three stand as they did, a line lower; the third and the fifth are gone, and two are new.
    assert told[("corpus", "mine")] in {(2, 2, 0), (1, 1, 1), (0, 0, 2)}
    assert told[("quarantine", "mine")] == (1, 0, 0) and len(told) == 2
    git(clone, "commit", "--all", "--message", "second")
    assert json.loads(forja(clone, "data", "diff", "HEAD~1", "HEAD", "--json"))["rows"] == found
    assert "no row differs between HEAD and the working tree" in forja(clone, "data", "diff")
    assert "no revision of this git repository" in forja(clone, "data", "diff", "nowhere", status=2)

    # The default store takes it, and another clone gets it from there; the first snapshot was never pushed.
    call(clone, "dvc", "push")
    git(tmp_path, "clone", "--quiet", str(clone), "two")
    two = tmp_path / "two"
    shutil.rmtree(two / "data", ignore_errors=True)
    call(two, "dvc", "pull", "data.dvc")
    for path in sorted(p.relative_to(clone) for p in (clone / "data").rglob("*") if p.is_file()):
        assert (two / path).read_bytes() == (clone / path).read_bytes()
    assert "neither DVC's cache nor a remote holds data" in forja(two, "data", "diff", "HEAD~1", status=2)


def test_by_hand_once_and_not_again_while_nothing_changed(clone: Path) -> None:
    said = forja(clone, "ingest", "mine", str(clone / "more.csv"))
    for word in ("mine", "text", "corpus 6", "pairs", "instructions", "quarantined"):
        assert word in said
    assert dvc.read_yaml(clone / "data.dvc")["meta"]["config"]["sources"][1]["source"] == "more.csv"
    assert "none has changed, none was read" in " ".join(forja(clone, "ingest", "mine", "more.csv").split())
    (clone / "more.csv").write_text("question,answer\nWhat?,That.\nWho?,She.\n")
    forja(clone, "ingest", "mine", "more.csv")
    assert len(rows(clone, "instructions")) == 2
    assert snapshot.need(clone, ingest_section(clone)).action == "keep"  # the recipe does not replace it
    others = snapshot.need(clone, {**ingest_section(clone), "sources": [{"source": "talks"}]})
    said = "of mine, more.csv: the recipe's own sources (talks) are not read; delete data.dvc to have them"
    assert others == ("keep", f"the snapshot was taken by hand, {said}")
    wrong = forja(clone, "ingest", "mine", "--shape", "alpacca", status=2)
    assert "ingest.sources.0.shape: one of text, alpaca" in " ".join(wrong.split())
    assert "no such file or folder" in forja(clone, "ingest", "nothing", status=2)
