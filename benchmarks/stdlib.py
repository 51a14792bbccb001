"""Documents for the benchmarks of data, made of what ships with Python: the reference, and the docstrings and code of
the standard library, with copies of some of them.
"""

import ast
import os
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

PIECE = 1500  # characters of a document, about
TESTS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "turtledemo"}


def documents(megabytes: float) -> list[str]:
    """Prose whose paragraphs are a line each, as web pages have them, and code as it stands, shuffled."""
    paths = [p for p in sorted(Path(os.__file__).parent.rglob("*.py")) if not TESTS & set(p.parts)]
    random.Random(0).shuffle(paths)
    found: list[str] = []
    for text in (*(_unwrapped(topic) for topic in topics.values()), *map(_documented, paths)):
        found += _pieces(text)
        if sum(map(len, found)) > megabytes * 1e6:
            break
    random.Random(0).shuffle(found)
    return found


def _documented(path: Path) -> str:
    """A module's docstrings, and the first half of its code."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return "\n".join([*(_unwrapped(d) for d in _docstrings(text)), text[: len(text) // 2]])


def near_copies(texts: list[str], every: int) -> list[str]:
    """Of every so many texts a copy with 0 to 16 words changed."""
    rng = random.Random(0)
    vocabulary = sorted({word for text in texts for word in text.split()})
    copies = []
    for text in texts[::every]:
        words = text.split(" ")
        for _ in range(rng.choice([0, 1, 2, 4, 8, 16])):
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
        copies.append(" ".join(words))
    return copies


def questions(texts: list[str], every: int) -> list[str]:
    """Sentences of 20 to 40 words out of the texts: what a test set might ask."""
    found = []
    for text in texts[::every]:
        of_text = [s for s in re.split(r"(?<=[.?!])\s+", text) if 20 <= len(re.findall(r"\w{2,}", s)) <= 40]
        found += of_text[:1]
    return sorted(set(found))


def _docstrings(source: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]


def _unwrapped(text: str) -> str:
    return "\n".join(" ".join(block.split()) for block in text.split("\n\n") if block.strip())


def _pieces(text: str) -> Iterator[str]:
    lines: list[str] = []
    size = 0
    for line in text.split("\n"):
        lines.append(line)
        size += len(line)
        if size > PIECE:
            yield "\n".join(lines)
            lines, size = [], 0
    if size:
        yield "\n".join(lines)
