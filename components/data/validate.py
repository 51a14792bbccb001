"""Validate: the rows of data/ that may be learnt from, and for every other row the reason.

1. each line is read and checked against its table's rules;
2. exact duplicates go: where copies stand in several splits, the test row stays, then the val row;
3. where the recipe asks for it: rows in unwanted languages, near-duplicates and poison go, personal data is flagged or
   redacted;
4. train rows that hold words of the test, or of a set that the recipe names, go;
5. Great Expectations looks at each table as a whole, and its verdict is the stage's.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from components.artifact import ForjaError, to_json
from components.data import clean, datadocs, suites
from components.data.contamination import contaminated
from components.data.rules import Limits, Row, Unfit, check, content, parse
from components.log import Log

TABLES = ("corpus", "instructions", "preferences", "prompts", "eval")
STAYS = {"test": 0, "val": 1, "train": 2}  # which of several copies is kept
LATER = ("duplicate", "near-duplicate", "contaminated", "poison", "language")  # reasons that no rule of a row gives


class Tables(BaseModel, frozen=True, extra="forbid"):
    """The limits of each table."""

    corpus: Limits
    instructions: Limits
    preferences: Limits
    prompts: Limits
    eval: Limits


class Config(BaseModel, frozen=True, extra="forbid"):
    """`ngram` words shared with the test make a train row contaminated, or a held-out text of `whole` words in full."""

    ngram: int = Field(ge=2)
    whole: int = Field(ge=1)
    decontaminate: list[str]  # files or folders that must not be trained on, beside data/eval and the test split
    near_duplicates: float | None = Field(ge=0.5, lt=1)  # Jaccard similarity of runs of five words, in one table
    languages: list[str] | None  # those wanted, by what the text is in; null: any
    pii: Literal["off", "flag", "redact"]
    poison: Literal["off", "flag", "drop"]
    tables: Tables


@dataclass
class Line:
    """One line of a table as it was read. `reason` is why it is rejected, "" while it is kept."""

    file: str
    number: int
    raw: bytes
    row: Row
    reason: str = ""
    redacted: bytes = b""  # what is written in place of `raw`


def run(cfg: Config, data: Path, out: Path, log: Log) -> dict[str, float]:
    """Write the kept rows of every table, rejected.jsonl, funnel.json, expectations.json and docs/index.html to `out`.

    Raises ForjaError, naming table, expectation and examples, when an expectation does not hold.
    """
    limits: dict[str, Limits] = {table: getattr(cfg.tables, table) for table in TABLES}
    lines = {table: list(_read(table, data, limits[table])) for table in TABLES}
    log({"progress": 0.3}, 1)
    for of_table in lines.values():
        _reject_used_ids(of_table)
    for table in TABLES:
        _reject_duplicates(table, lines[table])
    log({"progress": 0.4}, 2)
    told = _clean(cfg, lines)
    _reject_contaminated(cfg, lines)
    log({"progress": 0.6}, 3)
    kept = {table: [line for line in lines[table] if not line.reason] for table in TABLES}
    broken = {table: [_broken(line) for line in lines[table]] for table in TABLES}
    rows = {table: [line.row for line in kept[table]] for table in TABLES}
    found = suites.expectations(rows, broken, limits)
    _verdict(found)
    log({"progress": 0.9}, 4)

    funnel = {table: _funnel(lines[table], kept[table]) for table in TABLES}
    rejected = [_rejected(table, line) for table in TABLES for line in lines[table] if line.reason]
    for table in TABLES:
        (out / f"{table}.jsonl").write_bytes(b"".join((line.redacted or line.raw) + b"\n" for line in kept[table]))
    page = datadocs.render(funnel, found, rejected)
    unread = clean.unread(data)
    rejected += unread
    text = "".join(json.dumps(r, sort_keys=True, ensure_ascii=False) + "\n" for r in rejected)
    (out / "rejected.jsonl").write_text(text, encoding="utf-8", newline="\n")
    (out / "funnel.json").write_text(to_json(funnel), encoding="utf-8", newline="\n")
    (out / "expectations.json").write_text(to_json(found), encoding="utf-8", newline="\n")
    (out / "docs").mkdir()
    (out / "docs" / "index.html").write_text(page, encoding="utf-8", newline="\n")
    (out / "flagged.json").write_text(to_json(told), encoding="utf-8", newline="\n")
    counts = {f"{check}.flagged": float(len(rows)) for check, rows in told.items()}
    return _metrics(funnel, found) | counts | {"unread": float(len(unread))}


def _clean(cfg: Config, lines: dict[str, list[Line]]) -> dict[str, list[dict[str, Any]]]:
    """The checks that the recipe asks for. Returns what is only flagged, by check: {table, id, why}."""
    told: dict[str, list[dict[str, Any]]] = {"pii": [], "poison": []}
    for table in TABLES:
        left = [line for line in lines[table] if not line.reason]
        if cfg.languages is not None:
            for line, why in zip(left, clean.languages(table, [x.row for x in left], cfg.languages), strict=True):
                line.reason = why
            left = [line for line in left if not line.reason]
        if cfg.near_duplicates is not None and table != "eval":
            left.sort(key=lambda line: STAYS[line.row["split"]])  # stable: the test's copy stays
            for i, of in clean.near_duplicates(table, [x.row for x in left], cfg.near_duplicates).items():
                left[i].reason = f"near-duplicate: of {left[of].row['id']}"
            left = [line for line in left if not line.reason]
        if cfg.poison != "off" and table != "eval":
            for i in clean.poisoned(table, [x.row for x in left]):
                told["poison"].append({"table": table, "id": left[i].row["id"], "why": "a trigger, and noise after it"})
                if cfg.poison == "drop":
                    left[i].reason = "poison: noise after a phrase that other rows have before noise too"
            left = [line for line in left if not line.reason]
        if cfg.pii != "off":
            for i, (row, kinds) in clean.personal(table, [x.row for x in left]).items():
                told["pii"].append({"table": table, "id": left[i].row["id"], "why": ", ".join(kinds)})
                if cfg.pii == "redact":
                    left[i].row = row
                    left[i].redacted = json.dumps(row, ensure_ascii=False).encode()
    return told


def _read(table: str, data: Path, limits: Limits) -> Iterator[Line]:
    """Every line of the table's files, in the order of their names. A line ends at LF alone."""
    for path in sorted((data / table).rglob("*.jsonl")):
        name = path.relative_to(data).as_posix()
        with path.open("rb") as f:
            for number, raw in enumerate(f, start=1):
                line = Line(name, number, raw.removesuffix(b"\n"), {})
                try:
                    line.row = parse(line.raw)
                    check(table, line.row, limits)
                except Unfit as e:
                    line.reason = str(e)
                yield line


def _reject_used_ids(lines: list[Line]) -> None:
    first: dict[str, Line] = {}
    for line in lines:
        if not line.reason and (other := first.setdefault(line.row["id"], line)) is not line:
            line.reason = f"id used twice: also at {other.file}:{other.number}"


def _reject_duplicates(table: str, lines: list[Line]) -> None:
    first: dict[str, Line] = {}
    kept = [line for line in lines if not line.reason]
    for line in sorted(kept, key=lambda line: STAYS[line.row["split"]]):  # stable: else in the order read
        if (other := first.setdefault(content(table, line.row), line)) is not line:
            line.reason = f"duplicate: of {other.row['id']}"


def _reject_contaminated(cfg: Config, lines: dict[str, list[Line]]) -> None:
    kept = {table: [line for line in lines[table] if not line.reason] for table in TABLES}
    tables = {table: [line.row for line in kept[table]] for table in TABLES}
    extra = clean.held_out(cfg.decontaminate, cfg.whole)
    for hit in contaminated(tables, cfg.ngram, cfg.whole, extra=extra):
        kept[hit.table][hit.row].reason = f'contaminated: holds "{hit.phrase}" of {hit.held}'


def _category(line: Line) -> str:
    return line.reason.partition(":")[0]


def _broken(line: Line) -> str | None:
    """The rule that the line broke, with its place; None where it is kept or goes for what other rows hold."""
    return f"{line.file}:{line.number} {line.reason}" if line.reason and _category(line) not in LATER else None


def _verdict(found: dict[str, list[dict[str, Any]]]) -> None:
    for table, results in found.items():
        for r in results:
            if r["success"]:
                continue
            counted = f"{r['unexpected']} of {r['rows']} rows, such as {'; '.join(r['examples']) or 'none'}"
            mend = f"mend the data, or the limits in validate.tables.{table}"
            raise ForjaError(f"{table}: {r['expectation']} fails on {r['column'] or 'the table'}: {counted}; {mend}")


def _funnel(lines: list[Line], kept: list[Line]) -> dict[str, Any]:
    counted = {key: dict(Counter(line.row[key] for line in kept)) for key in ("split", "source", "licence")}
    return {
        "read": len(lines),
        "kept": len(kept),
        "rejected": dict(Counter(_category(line) for line in lines if line.reason)),
        "splits": counted["split"],
        "sources": counted["source"],
        "licences": counted["licence"],
    }


def _rejected(table: str, line: Line) -> dict[str, Any]:
    row = line.raw.decode("utf-8", errors="backslashreplace")
    return {"table": table, "file": line.file, "line": line.number, "reason": line.reason, "row": row}


def _metrics(funnel: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    metrics = {}
    for table, counts in funnel.items():
        metrics[f"{table}.read"] = float(counts["read"])
        metrics[f"{table}.kept"] = float(counts["kept"])
        metrics[f"{table}.rejected"] = float(counts["read"] - counts["kept"])
    metrics["contaminated"] = float(sum(c["rejected"].get("contaminated", 0) for c in funnel.values()))
    metrics["duplicates"] = float(sum(c["rejected"].get("duplicate", 0) for c in funnel.values()))
    metrics["expectations"] = float(sum(len(results) for results in found.values()))
    return metrics
