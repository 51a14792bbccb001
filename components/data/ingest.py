"""Ingest: sources become data/, five tables of JSONL, what was turned away, and a record.

    corpus        id source licence provenance lang object split line  text
    instructions  ...                                                  messages
    preferences   ...                                                  messages chosen rejected kind
    prompts       ...                                                  messages
    eval          ...                                                  question choices answer

A source is python-docs (the documentation of Python or of an installed package, with generated problems), problems
(these alone), a file, a folder, a glob, or a set of the Hugging Face hub. sources.json says what each gave;
quarantine.jsonl holds, with file, line and reason, every record that was read and turned away.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, field_validator

from components.artifact import building, to_json, write_record
from components.data import convert, hfsets, mix, pyrows, readers
from components.data.convert import Job, Origin, Tally
from components.data.language import AUTO
from components.data.mix import TABLES, Source, Will
from components.data.spread import HERE, Executor, each
from components.log import Log

PYTHON, PROBLEMS = "python-docs", "problems"
MADE = (PYTHON, PROBLEMS)  # sources that are no files
TOGETHER = 1 << 23  # bytes of small files that are one piece of work


class Config(BaseModel, frozen=True, extra="forbid"):
    """`seed`, `package`, `problems` and `limit` speak of what forja makes; the others choose among all records."""

    sources: list[Source] = Field(min_length=1)
    licences: list[str] | None  # None: all
    exclude_sources: list[str]  # patterns of what rows say as their source
    exclude_ids: str | None  # a file of ids that opted out, one a line
    seed: int
    package: str | None  # None: the standard library
    problems: int = Field(ge=0, le=100_000)
    limit: int | None = Field(ge=1)  # keep the first objects by hash, for a small recipe

    @field_validator("sources")
    @classmethod
    def once(cls, sources: list[Source]) -> list[Source]:
        names = [s.source for s in sources]
        if again := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"{again} stands there twice")
        return sources


def ingest(
    cfg: Config, out: Path, log: Log, config: dict[str, Any] | None = None, inputs: dict[str, str] | None = None,
    executor: Executor = HERE,
) -> dict[str, float]:  # fmt: skip
    """Write the data snapshot to `out` and seal it. `config` is what its record says of the recipe, where the paths of
    `cfg` are this machine's; `inputs` are the digests of the sources' files. Returns the records read, kept and turned
    away by source, and the rows by table.

    Raises ForjaError when a source is not there or holds nothing.
    """
    with building(out) as folder:
        counts, told = _all(cfg, folder, log, config, executor)
        (folder / "sources.json").write_text(to_json(told), encoding="utf-8", newline="\n")
        (folder / "quarantine.jsonl").touch()
        write_record(folder, "ingest", config=config or cfg.model_dump(mode="json"), inputs=inputs, metrics=counts)
    log({"progress": 1.0, **counts}, 1)
    return counts


def _all(
    cfg: Config, folder: Path, log: Log, config: dict[str, Any] | None, executor: Executor
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    names = [s.source for s in cfg.sources]
    told: list[dict[str, Any]] = []
    extra: dict[str, float] = {}
    counts = {f"{table}.rows": 0.0 for table in TABLES}
    given = [s["source"] for s in config["sources"]] if config else names
    for i, (source, label) in enumerate(zip(cfg.sources, mix.labels(names), strict=True)):
        log({"progress": i / len(names)}, 0)
        origin = _origin(cfg, source, label)
        if source.source in MADE:
            tally, more, version = _made(cfg, source, origin, folder, log)
            files, extra = 0, extra | more
        elif source.source.startswith("hf:"):
            tally, files, version = _hub(source, origin, folder)
        else:
            (tally, files), version = _files(source, origin, folder, executor), given[i]
        if tally.read != tally.kept + tally.quarantined:
            raise AssertionError(f"{label}: {tally.read} read, {tally.kept} kept, {tally.quarantined} turned away")
        counts |= {f"{label}.{k}": float(getattr(tally, k)) for k in ("read", "kept", "quarantined")}
        for (_, table), n in tally.rows.items():
            counts[f"{table}.rows"] += n
        told.append(_told(label, version, files, tally))
    return counts | extra, told


def _origin(cfg: Config, source: Source, label: str) -> Origin:
    will = Will(
        share=source.weight / max(s.weight for s in cfg.sources),
        licences=None if cfg.licences is None else frozenset(cfg.licences),
        sources=tuple(cfg.exclude_sources),
        ids=mix.read_ids(cfg.exclude_ids),
    )
    return Origin(label, None, source.shape, source.licence or "unknown", source.lang, source.split, will)


def _told(label: str, version: str, files: int, tally: Tally) -> dict[str, Any]:
    """What sources.json says of one source."""
    rows = [{"shape": s, "table": t, "rows": n} for (s, t), n in sorted(tally.rows.items())]
    return {
        "source": label,
        "from": version,
        "files": files,
        "read": tally.read,
        "kept": tally.kept,
        "quarantined": tally.quarantined,
        "rows": rows,
        "splits": dict(sorted(tally.splits.items())),
        "licences": dict(sorted(tally.licences.items())),
        "reasons": dict(sorted(tally.reasons.items())),
    }


def _made(cfg: Config, source: Source, origin: Origin, folder: Path, log: Log) -> tuple[Tally, dict[str, float], str]:
    log({"progress": 0.0}, 0)
    if source.source == PYTHON:
        tables, extra = pyrows.tables(cfg.package, cfg.seed, cfg.problems, cfg.limit)
    else:
        lang = None if source.lang == AUTO else source.lang
        tables, extra = pyrows.problem_tables(cfg.seed, cfg.problems, lang), {}
    log({"progress": 0.5}, 0)
    tally = convert.NOTHING
    versions: set[str] = set()
    for table, rows in tables.items():
        path = folder / table / ("python.jsonl" if source.source == PYTHON else "problems.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as f, (folder / "quarantine.jsonl").open("ab") as away:
            for row in rows:
                tally += _made_row(table, row, origin, f, away)
                versions.add(row["provenance"].partition(":")[0])
    return tally, extra, ", ".join(sorted(versions))


def _made_row(table: str, row: dict[str, Any], origin: Origin, f: Any, away: Any) -> Tally:
    reason = origin.will.against(row["id"], row, row["source"], row["licence"], row["id"])
    if reason is None:
        f.write(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        return convert.NOTHING._replace(
            read=1,
            kept=1,
            rows=Counter({(origin.label, table): 1}),
            splits=Counter({row["split"]: 1}),
            licences=Counter({row["licence"]: 1}),
        )
    away.write(convert.quarantined(readers.Record(row["id"], 0, None, b"", reason), reason, origin.label))
    return convert.NOTHING._replace(read=1, reasons=Counter({reason.partition(":")[0]: 1}))


def _hub(source: Source, origin: Origin, folder: Path) -> tuple[Tally, int, str]:
    tally, sets = convert.NOTHING, hfsets.splits(source.source, origin.label)
    name = source.source.partition("@")[0]
    version = name
    for found in sets:
        version = f"{name}@{found.revision}" if found.revision else name
        of_set = origin._replace(licence=source.licence or found.licence or "unknown", version=version)
        with convert.Out(folder / ".part") as files:
            first, sample = convert.sampled(found.records)
            held = convert.held_split(found.name.rpartition("/")[2])
            tally += convert.convert(first, sample, of_set, source.table, held, files)
    _append(folder / ".part", folder, origin.label)
    return tally, len(sets), version


def _files(source: Source, origin: Origin, folder: Path, executor: Executor) -> tuple[Tally, int]:
    """Convert the files of a source, piece by piece; the parts come together in their order."""
    paths = readers.files_of(source.source)
    jobs = enumerate(_work(source, origin.label, paths))
    work = (convert.Work(some, origin, folder / f".part-{i}") for i, some in jobs)
    tally = convert.NOTHING
    size = sum(p.stat().st_size for p in paths)
    logs = folder / ".logs"
    done = list(each(convert.read, work, executor, size, logs))
    for i, piece in enumerate(done):
        tally += convert.tally_of(piece.out)
        _append(piece.out, folder, f"{origin.label}/{i:05d}" if len(done) > 1 else origin.label)
    shutil.rmtree(logs, ignore_errors=True)
    return tally, len(paths)


def _work(source: Source, label: str, paths: list[Path]) -> Iterator[list[Job]]:
    """The pieces of work: parts of large files, and small files together."""
    root = Path(source.source)
    together: list[Job] = []
    size = 0
    for path in paths:
        inside = path.relative_to(root).as_posix() if root.is_dir() else path.name
        table: str | None = source.table or next((t for t in TABLES if inside.startswith(f"{t}/")), None)
        name = f"{label}/{readers.shown(inside)}" if root.is_dir() or len(paths) > 1 else label
        held = convert.held_split(inside)
        for part in convert.parts_of(path):
            if part is not None:
                yield [Job(path, name, part, table, held)]
                continue
            together.append(Job(path, name, None, table, held))
            size += path.stat().st_size
        if size > TOGETHER:
            yield together
            together, size = [], 0
    if together:
        yield together


def _append(part: Path, folder: Path, name: str) -> None:
    """Give what a piece of work wrote its place in the tables; its quarantine goes behind the others'."""
    for path in sorted(part.glob("*.jsonl")):
        if path.stem != "quarantine":
            into = folder / path.stem / f"{name}.jsonl"
            into.parent.mkdir(parents=True, exist_ok=True)
            path.replace(into)
            continue
        with path.open("rb") as f, (folder / path.name).open("ab") as whole:
            shutil.copyfileobj(f, whole, 1 << 22)
    shutil.rmtree(part, ignore_errors=True)
