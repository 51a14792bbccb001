"""Rows that came, went and changed, on snapshots written here."""

import json
from pathlib import Path
from typing import Any

from pipelines.data_diff import Snapshot, compare


def snap(folder: Path, tables: dict[str, list[dict[str, Any]]]) -> Snapshot:
    files = {}
    for name, rows in tables.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        files[f"{name}.jsonl"] = (path.read_text(), path)
    return Snapshot(folder.name, None, files)


def row(number: int, text: str, source: str = "s", **more: Any) -> dict[str, Any]:
    return {
        "id": f"f:{number}",
        "line": f"f:{number}",
        "provenance": f"f {number}",
        "source": source,
        "text": text,
        **more,
    }


def told(tmp_path: Path, old: dict[str, Any], new: dict[str, Any]) -> dict[tuple[str, str], tuple[Any, ...]]:
    found = compare(snap(tmp_path / "old", old), snap(tmp_path / "new", new))["rows"]
    keys = ("came", "went", "changed")
    return {(r["table"], r["source"]): (*(r[k] for k in keys), [r["examples"][k] for k in keys]) for r in found}


def test_moved_rows_are_the_same_and_changed_ones_keep_their_id(tmp_path: Path) -> None:
    old = [row(1, "a"), row(2, "b"), row(3, "c"), row(4, "d")]
    new = [row(1, "new"), row(2, "a"), row(3, "C"), row(5, "d")]  # a and d moved, b went, c became C
    assert told(tmp_path, {"corpus/f": old}, {"corpus/f": new}) == {
        ("corpus", "s"): (1, 1, 1, [["f:1"], ["f:2"], ["f:3"]])
    }


def test_tables_sources_and_licences_are_told_apart(tmp_path: Path) -> None:
    old = {"corpus/f": [row(1, "a"), row(2, "b", "t")], "eval/f": [row(1, "q")], "corpus/same": [row(9, "z", "u")]}
    new = {"corpus/g": [row(1, "a"), row(2, "b", "u")], "corpus/same": [row(9, "z", "u")]}
    new["prompts/f"] = [row(1, "q"), row(2, "p", licence="MIT")]
    assert {k: v[:3] for k, v in told(tmp_path, old, new).items()} == {
        ("corpus", "t"): (0, 1, 0),
        ("corpus", "u"): (1, 0, 0),
        ("eval", "s"): (0, 1, 0),
        ("prompts", "s"): (2, 0, 0),
    }


def test_copies_count_one_against_one(tmp_path: Path) -> None:
    old = [row(1, "a"), row(2, "a"), row(3, "a")]
    assert told(tmp_path, {"corpus/f": old}, {"corpus/f": [row(7, "a")]})[("corpus", "s")][:3] == (0, 2, 0)


def test_the_quarantine_is_compared_too(tmp_path: Path) -> None:
    old = [{"file": "f", "line": 1, "reason": "empty line", "raw": "", "source": "s"}]
    new = [{"file": "f", "line": 1, "reason": "not JSON: x", "raw": "{", "source": "s"}]
    assert told(tmp_path, {"quarantine": old}, {"quarantine": new}) == {
        ("quarantine", "s"): (0, 0, 1, [[], [], ["f:1"]])
    }
