"""Ingest: a source becomes data/, five tables of JSONL and a record.

    corpus        id source licence provenance lang object split  text
    instructions  ...                                             messages
    preferences   ...                                             messages chosen rejected kind
    prompts       ...                                             messages
    eval          ...                                             question choices answer

The source is the documentation of Python or of an installed package, with generated problems, or a folder of the same
layout (folder.py).
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from components.artifact import building, write_record
from components.data import problems, questions, sources
from components.data.folder import read_folder
from components.data.sources import Doc, Origin, hashed, split_of
from components.log import Log

TABLES = ("corpus", "instructions", "preferences", "prompts", "eval")
CHUNK_CHARS = 3000
GENERATED = Origin("generated", "CC0-1.0", "components/data/problems.py")

Row = dict[str, Any]


class Config(BaseModel, frozen=True, extra="forbid"):
    """`source` is "python-docs" or a folder; the other keys speak of python-docs alone."""

    source: str
    package: str | None  # None: the standard library
    seed: int
    problems: int = Field(ge=0, le=100_000)
    limit: int | None = Field(ge=1)  # keep the first objects by hash, for a small recipe


def ingest(cfg: Config, out: Path, log: Log) -> dict[str, float]:
    """Write the data snapshot to `out` and seal it. Returns the number of rows by table, and what was not readable.

    Raises ForjaError when the source is not there or holds nothing to learn from.
    """
    with building(out) as folder:
        counts = _python_docs(cfg, folder, log) if cfg.source == "python-docs" else read_folder(cfg.source, folder)
        write_record(folder, "ingest", config=cfg.model_dump(), metrics=counts)
    log({"progress": 1.0, **counts}, 1)
    return counts


def _python_docs(cfg: Config, folder: Path, log: Log) -> dict[str, float]:
    log({"progress": 0.0}, 0)
    origin, docs, failed = sources.python_docs(cfg.package)
    log({"progress": 0.5}, 0)
    reference = sources.topics() if cfg.package is None else {}
    if cfg.limit is not None:
        groups = sorted({d.object for d in docs} | {f"topic {t}" for t in reference}, key=hashed)
        kept = set(groups[: cfg.limit])
        docs = [d for d in docs if d.object in kept]
        reference = {t: text for t, text in reference.items() if f"topic {t}" in kept}
    about_docs = questions.of_docs(docs, cfg.seed)
    about_problems = questions.of_problems(problems.generate(cfg.problems, cfg.seed))
    asked = about_docs + about_problems
    tables: dict[str, Iterable[Row]] = {
        "corpus": _corpus(origin, docs, reference),
        "instructions": (_row(origin, q, "instruction", messages=q.messages + q.answer) for q in asked),
        "preferences": (
            _row(origin, q, "preference", messages=q.messages, chosen=q.first, rejected=rejected, kind=kind)
            for q, kind, rejected in questions.preferences(asked, cfg.seed)
        ),
        "prompts": (_row(origin, q, "prompt", messages=q.messages) for q in _one_an_object(asked, cfg.seed)),
        "eval": _eval(origin, docs, cfg.seed),
    }
    counts = {f"{table}.rows": float(_write(folder / table / "python.jsonl", rows)) for table, rows in tables.items()}
    return counts | {"objects": float(len(docs)), "modules.failed": float(failed)}


def _corpus(origin: Origin, docs: list[Doc], reference: dict[str, str]) -> Iterator[Row]:
    pages = [(d.object, d.name, f"docstring of {d.name}", f"{d.signature or d.name}\n\n{d.text}") for d in docs]
    pages += [(f"topic {t}", f"topic {t}", f"pydoc topic {t}", text) for t, text in reference.items()]
    for group, name, what, text in pages:
        for i, piece in enumerate(sources.chunks(text, CHUNK_CHARS)):
            yield _common(origin, f"corpus/{name}/{i}", what, "en", group) | {"text": piece}


def _eval(origin: Origin, docs: list[Doc], seed: int) -> Iterator[Row]:
    for doc, four, answer in questions.choices(docs, seed):
        common = _common(origin, f"choice/{doc.name}", f"docstring of {doc.name}", "en", doc.object)
        question = questions.ASK["describe"]["en"][0].format(n=doc.name)
        yield common | {"question": question, "choices": four, "answer": answer}


def _one_an_object(asked: list[questions.Question], seed: int) -> Iterator[questions.Question]:
    """For each name or expression the question that comes first by hash, in the order asked."""
    first: dict[str, questions.Question] = {}
    for q in asked:
        best = first.setdefault(q.about, q)
        if hashed(f"{seed}/prompt/{q.key}") < hashed(f"{seed}/prompt/{best.key}"):
            first[q.about] = q
    return iter(first.values())


def _row(origin: Origin, question: questions.Question, what: str, **fields: Any) -> Row:
    if question.topic == "problem":
        origin, provenance = GENERATED, question.object
    else:
        provenance = f"docstring of {question.about}"
    return _common(origin, f"{what}/{question.key}", provenance, question.lang, question.object) | fields


def _common(origin: Origin, row_id: str, what: str, lang: str, group: str) -> Row:
    return {
        "id": row_id,
        "source": origin.source,
        "licence": origin.licence,
        "provenance": f"{origin.version}: {what}",
        "lang": lang,
        "object": group,
        "split": split_of(group),
    }


def _write(path: Path, rows: Iterable[Row]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows)
    with path.open("w", encoding="utf-8", newline="\n") as f:
        return sum(1 for line in lines if f.write(line))
