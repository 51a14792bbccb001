"""Where the default data comes from: the docstrings and the language reference of the Python that runs forja.

A `Doc` is one object of a library with its docstring. Docs with one summary share a group (`object`), and the split is
by hash of the group, so that a copy of a test object's description is never trained on.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from components.artifact import ForjaError
from components.data import pydocs

COLLECT_SECONDS = 600
SUMMARY_CHARS = (15, 200)


class Doc(NamedTuple):
    """One documented object. `summary` is the first sentence of its docstring, or "" where none is fit to answer."""

    name: str
    kind: str  # function, class, method or module
    module: str
    signature: str  # "json.dumps(obj, *, skipkeys=False)", or ""
    text: str
    summary: str
    object: str


class Origin(NamedTuple):
    """Where rows come from: what every row says about its source."""

    source: str
    licence: str
    version: str  # "Python 3.11.7" or "numpy 2.4.6"


def hashed(text: str) -> int:
    """A 64-bit number from `text` that does not depend on the process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def split_of(group: str) -> str:
    """The split of an object: train, val or test as 90/5/5, by its hash alone."""
    share = hashed(f"split/{group}") / 2**64
    return "train" if share < 0.90 else "val" if share < 0.95 else "test"


def python_docs(package: str | None) -> tuple[Origin, list[Doc], int]:
    """The documented objects of the standard library or of a package, and how many modules would not import.

    Raises ForjaError when the package is not installed or its docstrings cannot be collected.
    """
    origin = _origin(package)
    *rows, last = _collect(package)
    if not rows:
        raise ForjaError(f"package: {package} has no docstrings; choose a package written in documented Python")
    docs = [_doc(row) for row in rows if " " in row["doc"]]  # the docstring of ast.Add is "Add"
    first: dict[str, str] = {}
    for doc in docs:  # sorted by name within a module: the first of a group lends it its name
        first.setdefault(_group_key(doc), doc.name)
    return origin, [doc._replace(object=first[_group_key(doc)]) for doc in docs], len(last["failed"])


def topics() -> dict[str, str]:
    """The language reference that ships with Python: text by topic, 79 topics and about 465 kB in 3.11."""
    from pydoc_data.topics import topics as texts

    return dict(sorted(texts.items()))


def _origin(package: str | None) -> Origin:
    if package is None:
        return Origin("python-docs", "PSF-2.0", f"Python {platform.python_version()}")
    top = package.partition(".")[0]
    if not all(part.isidentifier() for part in package.split(".")) or importlib.util.find_spec(top) is None:
        raise ForjaError(f"package: {package} is not installed here; pip install {package}, or check the import name")
    names = importlib.metadata.packages_distributions().get(top, [])
    if not names:
        return Origin(f"python-docs:{package}", "unknown", package)
    about = importlib.metadata.metadata(names[0]).json
    licence = str(about.get("license_expression") or about.get("license") or "unknown").partition("\n")[0].strip()
    return Origin(f"python-docs:{package}", licence[:80] or "unknown", f"{names[0]} {about['version']}")


def _collect(package: str | None) -> list[dict[str, Any]]:
    """Run pydocs.py in a child: for the standard library without site-packages, the same in every environment."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "docs.jsonl"
        environment = {k: v for k, v in os.environ.items() if package or not k.startswith("PYTHON")}
        flags = ["-s", "-P", "-X", "utf8"] + ([] if package else ["-S"])
        command = [sys.executable, *flags, pydocs.__file__, str(out), *([package] if package else [])]
        try:
            done = subprocess.run(  # noqa: S603 - our own script, under the running interpreter
                command,
                env=environment | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=COLLECT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ForjaError(f"package: importing {package} took over {COLLECT_SECONDS} s; name a subpackage") from None
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            name = package or "the standard library"
            raise ForjaError(f"package: collecting {name} ended with code {done.returncode} ({words[:200]})")
        return [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]


def _doc(row: dict[str, Any]) -> Doc:
    name, kind, text = row["name"], row["kind"], row["doc"]
    arguments = row["signature"]
    if kind == "method":  # the caller does not pass self
        arguments = re.sub(r"^\((self|cls)(, /)?(, )?", "(", arguments)
    signature = name + arguments if arguments else ""
    return Doc(name, kind, row["module"], signature, text, summary(text), "")


def _group_key(doc: Doc) -> str:
    return " ".join(re.findall(r"\w+", (doc.summary or doc.text).casefold()))


def summary(doc: str) -> str:
    """The first sentence of a docstring as plain text that ends in a full stop, or "" where none is fit to answer.

    Unfit are those shorter than 15 characters, longer than 200, and those that introduce a list or show code.
    """
    lines = doc.split("\n")
    if re.match(r"[\w.]+\(.*\)\s*(->.*)?$", lines[0]):  # old built-ins repeat their signature
        lines = lines[1:]
    paragraph = " ".join("\n".join(lines).strip().split("\n\n")[0].split())
    paragraph = re.sub(r":[\w:]+:`~?([^`]*)`", r"\1", paragraph).replace("`", "")
    paragraph = re.sub(r"\*(\w[\w ]*)\*", r"\1", paragraph)
    paragraph = re.sub(r"^[\w.]+(\(.*?\))?( ->.*?)? --? |^[\w.]+\(.*?\): ", "", paragraph)  # "wsgiref -- a library"
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<! vs)[.!?](?=\s|$)", paragraph)
    sentence = (paragraph[: end.end()] if end else paragraph).strip()
    sentence = sentence if sentence.endswith((".", "!", "?")) else sentence + "."
    unfit = sentence.endswith((":.", ",.")) or re.search(
        r">>>|---|===|\*\*\*|::|->|^\W|^\w+\(.*\)\.$|…|\.\.\.$", sentence
    )
    few, many = SUMMARY_CHARS
    if unfit or not few <= len(sentence) <= many or len(sentence.split()) < 3:
        return ""
    return sentence[0].upper() + sentence[1:] if sentence.split()[0].isalpha() else sentence


def chunks(text: str, most: int) -> list[str]:
    """`text` cut between paragraphs into pieces of at most `most` characters; a longer paragraph stays whole."""
    pieces: list[str] = []
    size = most + 1
    for paragraph in text.split("\n\n"):
        if size + 2 + len(paragraph) > most:
            pieces.append(paragraph)
            size = len(paragraph)
        else:
            pieces[-1] += "\n\n" + paragraph
            size += 2 + len(paragraph)
    return [p.strip("\n") for p in pieces if p.strip()]
