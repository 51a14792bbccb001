"""What forja makes itself as rows: Python's documentation, or an installed package's, and generated problems."""

from collections.abc import Iterable, Iterator
from typing import Any

from components.data import problems, questions, sources
from components.data.sources import Doc, Origin, hashed, split_of

CHUNK_CHARS = 3000
GENERATED = Origin("generated", "CC0-1.0", "components/data/problems.py")

Row = dict[str, Any]


def tables(
    package: str | None, seed: int, n_problems: int, limit: int | None
) -> tuple[dict[str, Iterable[Row]], dict[str, float]]:
    """The rows of each table, and how many objects there were and modules that would not import. `limit` keeps the
    first objects by hash."""
    origin, docs, failed = sources.python_docs(package)
    reference = sources.topics() if package is None else {}
    if limit is not None:
        groups = sorted({d.object for d in docs} | {f"topic {t}" for t in reference}, key=hashed)
        kept = set(groups[:limit])
        docs = [d for d in docs if d.object in kept]
        reference = {t: text for t, text in reference.items() if f"topic {t}" in kept}
    about_docs = questions.of_docs(docs, seed)
    about_problems = questions.of_problems(problems.generate(n_problems, seed))
    asked = about_docs + about_problems
    found: dict[str, Iterable[Row]] = {"corpus": _corpus(origin, docs, reference), **_asked(origin, asked, seed)}
    found["eval"] = _eval(origin, docs, seed)
    return found, {"objects": float(len(docs)), "modules.failed": float(failed)}


def problem_tables(seed: int, n_problems: int, lang: str | None) -> dict[str, Iterable[Row]]:
    """Generated problems alone, in one language or in both."""
    langs = problems.LANGS if lang is None else (lang,)
    return _asked(GENERATED, questions.of_problems(problems.generate(n_problems, seed, langs)), seed)


def _asked(origin: Origin, asked: list[questions.Question], seed: int) -> dict[str, Iterable[Row]]:
    return {
        "instructions": (_row(origin, q, "instruction", messages=q.messages + q.answer) for q in asked),
        "preferences": (
            _row(origin, q, "preference", messages=q.messages, chosen=q.first, rejected=rejected, kind=kind)
            for q, kind, rejected in questions.preferences(asked, seed)
        ),
        "prompts": (
            _row(origin, q, "prompt", messages=q.messages, **({} if q.truth is None else {"truth": q.truth}))
            for q in _one_an_object(asked, seed)
        ),
    }


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
