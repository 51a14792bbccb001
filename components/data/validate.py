"""Validate: the rows of data/ that may be learnt from, and for every other row the reason.

1. each line is read and checked against its table's rules, and what the later steps need of it is noted (shards.py);
2. exact duplicates go: where copies stand in several splits, the test row stays, then the val row;
3. where the recipe asks for it: rows in unwanted languages, documents of low quality, near-duplicates and poison go,
   personal data is flagged or redacted;
4. train rows that hold words of the test, or of a set that the recipe names, go;
5. Great Expectations looks at each table as a whole, and its verdict is the stage's.

Reading is done in shards by all cores or by a cluster, deciding here, on some hundred bytes a row (verdicts.py).
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import orjson
from pydantic import BaseModel, Field, field_validator

from components.artifact import ForjaError, to_json
from components.data import clean, datadocs, jsonlines, poison, suites
from components.data.jsonlines import Shard, lines
from components.data.quality import Quality
from components.data.rules import Limits
from components.data.shards import TABLES, Look, look
from components.data.spread import HERE, Executor, each
from components.data.verdicts import Table, category, load, splits_of_objects
from components.log import Log


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
    quality: Quality  # of the corpus: names of filters, or a mapping with their limits
    pii: Literal["off", "flag", "redact"]
    poison: Literal["off", "flag", "drop"]
    tables: Tables

    @field_validator("pii", "poison", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value


def run(cfg: Config, data: Path, out: Path, log: Log, executor: Executor = HERE) -> dict[str, float]:
    """Write the kept rows of every table, rejected.jsonl, funnel.json (by table), sources.json (by source),
    expectations.json, flagged.json and docs/index.html to `out`.

    Raises ForjaError, naming table, expectation and examples, when an expectation does not hold.
    """
    work = out / ".work"
    limits: dict[str, Limits] = {table: getattr(cfg.tables, table) for table in TABLES}
    tables = _looked(cfg, limits, data, work, log, executor)
    sources = _by_source(data, tables)
    for table in tables:
        table.reject_used_ids()
        table.reject_duplicates()
        table.reject_unwanted()
    told = _clean(cfg, tables, work, executor)
    log({"progress": 0.6}, 2)
    told["pii"] += _searched(cfg, tables, work, executor)
    log({"progress": 0.8}, 3)
    found = suites.expectations(
        {t.name: suites.frame(t.name, t.kept(), t.contents(), s) for t, s in splits_of_objects(tables)},
        {t.name: t.broken() for t in tables},
        {t.name: t.copies() for t in tables},
        limits,
    )
    _verdict(found)
    log({"progress": 0.9}, 4)

    funnel = {table.name: _funnel(table) for table in tables}
    shown, unread = _write(tables, data, out)
    page = datadocs.render(funnel, found, shown)
    (out / "funnel.json").write_text(to_json(funnel), encoding="utf-8", newline="\n")
    (out / "sources.json").write_text(to_json(sources), encoding="utf-8", newline="\n")
    (out / "expectations.json").write_text(to_json(found), encoding="utf-8", newline="\n")
    (out / "docs").mkdir()
    (out / "docs" / "index.html").write_text(page, encoding="utf-8", newline="\n")
    (out / "flagged.json").write_text(to_json(told), encoding="utf-8", newline="\n")
    shutil.rmtree(work)
    counts = {f"{check}.flagged": float(len(rows)) for check, rows in told.items()}
    return _metrics(funnel, found) | counts | {"unread": float(unread)}


def _looked(
    cfg: Config, limits: dict[str, Limits], data: Path, work: Path, log: Log, executor: Executor
) -> list[Table]:
    """The first pass over every table."""
    files = [(t, p, p.relative_to(data).as_posix()) for t in TABLES for p in sorted((data / t).rglob("*.jsonl"))]
    found = jsonlines.shards(files, work, jsonlines.SIZE)
    jobs = [
        Look(
            shard,
            limits[shard.table],
            None if cfg.languages is None else tuple(cfg.languages),
            cfg.quality if shard.table == "corpus" and cfg.quality != Quality() else None,
            cfg.near_duplicates if shard.table != "eval" else None,
            cfg.poison != "off" and shard.table != "eval",
        )
        for shard in found
    ]
    work.mkdir(parents=True)
    for i, _ in enumerate(each(look, jobs, executor, sum(s.end - s.start for s in found), work), start=1):
        log({"progress": 0.4 * i / len(jobs)}, 1)
    return [load(table, [s for s in found if s.table == table]) for table in TABLES]


def _clean(cfg: Config, tables: list[Table], work: Path, executor: Executor) -> dict[str, list[dict[str, Any]]]:
    """Near-duplicates and poison. Returns what is only flagged, by check: {table, id, why}."""
    told: dict[str, list[dict[str, Any]]] = {"pii": [], "poison": []}
    for table in tables:
        if cfg.near_duplicates is not None and table.name != "eval":
            table.reject_near_duplicates(cfg.near_duplicates)
        if cfg.poison != "off" and table.name != "eval" and table.shards:
            logs = work / f"poison-{table.name}"
            logs.mkdir()
            counts = poison.empty()
            for shard in table.shards:
                clean.counted(shard, counts)
            good, left = table.by_shard(table.good), table.by_shard(table.left)
            found = clean.poisoned(table.shards, counts, good, left, executor, logs, lambda done: None)
            for i in found:
                told["poison"].append({"table": table.name, "id": table.id(i), "why": "a trigger, and noise after it"})
                if cfg.poison == "drop":
                    table.reject(i, "poison: noise after a phrase that other rows have before noise too")
    return told


def _searched(cfg: Config, tables: list[Table], work: Path, executor: Executor) -> list[dict[str, Any]]:
    """Contaminated rows are rejected. Returns the rows with personal data, which are redacted where that is asked."""
    told: list[dict[str, Any]] = []
    found = [
        (table, s, left) for table in tables for s, left in zip(table.shards, table.by_shard(table.left), strict=True)
    ]
    held = [
        left & h
        for table in tables
        for left, h in zip(table.by_shard(table.left), table.by_shard(table.held()), strict=True)
    ]
    extra = clean.held_out(cfg.decontaminate, cfg.whole)
    redact = cfg.pii == "redact"
    each_shard = [s for _, s, _ in found]
    clean.make_index(each_shard, held, extra, cfg.ngram, cfg.whole, redact, executor, work / "index")
    jobs = [clean.Search(s, left, work / "index", cfg.pii) for _, s, left in found]
    done = each(clean.search, jobs, executor, sum(s.end - s.start for s in each_shard), work)
    for (table, shard, _), _ in zip(found, done, strict=True):
        first = table.first[table.shards.index(shard)]
        said = orjson.loads((shard.work / "found.json").read_bytes())
        for i, name, why in said["pii"]:
            told.append({"table": table.name, "id": name, "why": why})
            if redact:
                table.redacted.add(first + i)
        for i, _, owner, phrase in said["contaminated"]:
            table.reject(first + i, f'contaminated: holds "{phrase}" of {owner}')
    return told


def _verdict(found: dict[str, list[dict[str, Any]]]) -> None:
    for table, results in found.items():
        for r in results:
            if r["success"]:
                continue
            counted = f"{r['unexpected']} of {r['rows']} rows, such as {'; '.join(r['examples']) or 'none'}"
            mend = f"mend the data, or the limits in validate.tables.{table}"
            raise ForjaError(f"{table}: {r['expectation']} fails on {r['column'] or 'the table'}: {counted}; {mend}")


def _write(tables: list[Table], data: Path, out: Path) -> tuple[list[dict[str, Any]], int]:
    """Every line of data/ goes to its table or to rejected.jsonl, and what ingest turned away behind these. Returns the
    rejected rows that the page shows, and how many were turned away."""
    shown: list[dict[str, Any]] = []
    seen: Counter[tuple[str, str]] = Counter()
    with (out / "rejected.jsonl").open("w", encoding="utf-8", newline="\n") as away:
        for table in tables:
            with (out / f"{table.name}.jsonl").open("wb", buffering=1 << 20) as kept:
                for row in _sorted_out(table, kept):
                    away.write(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n")
                    kind = table.name, category(row["reason"])
                    seen[kind] += 1
                    if seen[kind] <= datadocs.EXAMPLES:
                        shown.append(row | {"row": row["row"][: datadocs.EXAMPLE_CHARS]})
        unread = 0
        for row, _ in _unread(data):
            away.write(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n")
            unread += 1
    return shown, unread


def _sorted_out(table: Table, kept: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Write the kept lines of a table, byte for byte but for what is redacted; yields the others."""
    for shard, first in zip(table.shards, table.first, strict=False):
        redacted = lines(Shard(shard.table, shard.work / "redacted.jsonl", "", 0, 1 << 62, shard.work))
        for i, line in enumerate(lines(shard), start=int(first)):
            new = next(redacted) if i in table.redacted else line
            if table.left[i]:
                kept.write(new + b"\n")
            else:
                file, number = table.place(i)
                row = line.decode("utf-8", errors="backslashreplace")
                yield {"table": table.name, "file": file, "line": number, "reason": table.why[i], "row": row}


def _unread(data: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """What ingest turned away, as rows of rejected.jsonl, each with its source."""
    path = data / "quarantine.jsonl"
    if path.is_file():
        with path.open("rb") as f:
            for r in map(json.loads, f):
                kept = {"file": r["file"], "line": r["line"], "reason": r["reason"], "row": r["raw"]}
                yield {"table": "unread", **kept}, r["source"]


def _by_source(data: Path, tables: list[Table]) -> dict[str, dict[str, Any]]:
    """Records read, kept and turned away by source, as ingest says and as its files hold. Raises ForjaError where the
    two differ. A data folder that ingest did not make says nothing of its sources."""
    path = data / "sources.json"
    if not path.is_file():
        return {}
    said = {s["source"]: s for s in json.loads(path.read_bytes())}
    away: dict[str, Counter[str]] = {source: Counter() for source in said}
    for row, source in _unread(data):
        away.setdefault(source, Counter())[category(row["reason"])] += 1
    mend = "the folder is not as ingest left it: run `forja ingest` again"
    for source, reasons in away.items():
        claim = said.get(source, {"read": 0, "kept": 0, "quarantined": 0})
        if claim["read"] != claim["kept"] + reasons.total() or claim["quarantined"] != reasons.total():
            counted = f"{claim['read']} read, {claim['kept']} kept, but {reasons.total()} in quarantine.jsonl"
            raise ForjaError(f"{path}: {source}: {counted}; {mend}")
    for table in tables:
        claimed = sum(r["rows"] for s in said.values() for r in s["rows"] if r["table"] == table.name)
        if claimed != len(table.left):
            raise ForjaError(f"{path}: {claimed} rows of {table.name}, but {len(table.left)} lines; {mend}")
    return {
        source: {**{k: said[source][k] for k in ("read", "kept", "quarantined")}, "reasons": dict(reasons)}
        for source, reasons in away.items()
    }


def _funnel(table: Table) -> dict[str, Any]:
    kept = table.kept()
    counted = {
        key: {v["values"]: v["counts"] for v in kept.column(key).value_counts().to_pylist()}
        for key in ("split", "source", "licence")
    }
    return {
        "read": len(table.left),
        "kept": len(kept),
        "rejected": dict(Counter(category(reason) for reason in table.why.values())),
        "splits": counted["split"],
        "sources": counted["source"],
        "licences": counted["licence"],
    }


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
