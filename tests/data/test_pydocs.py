"""Collecting docstrings: a package made for the test, and the standard library in a child process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.artifact import ForjaError
from components.data import pydocs, sources

SOURCE = '''
"""A small library.

It has a second paragraph.
"""
import json
from json import dumps            # a stranger's, left out
from little.inner import shared   # its own, found under the shorter name

SECRET = object()


class Base:
    """The base of things."""

    def greet(self, name, mark=SECRET):
        """Greet a person by ``name``. Then rest."""

    @classmethod
    def build(cls, size=3):
        """Build one of a size."""

    def _hidden(self):
        """Not public."""


class Child(Base):
    def other(self):
        """Do the other thing."""

    greet_too = Base.greet


def where(path=__file__):
    """Tell where it lives, given a path."""
'''
INNER = '''
"""The inner part."""
def shared(a, b=2):
    """Shared between two modules of the library."""
'''


@pytest.fixture
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "little"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SOURCE)
    (package / "inner.py").write_text(INNER)
    (package / "broken.py").write_text("raise SystemExit('no')")
    (package / "loud.py").write_text('"""A loud module."""\nprint("noise on stdout")\n')
    (package / "__main__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(str(package.parent))


def test_a_package_is_collected_once_under_the_names_people_use(little: None) -> None:
    origin, docs, failed = sources.python_docs("little")
    assert [d.name for d in docs] == [
        "little",
        "little.inner",
        "little.loud",
        "little.Base",
        "little.Base.build",
        "little.Base.greet",
        "little.Child.other",
        "little.shared",
        "little.where",
    ]
    assert failed == 1  # broken
    assert (origin.source, origin.licence) == ("python-docs:little", "unknown")
    by_name = {d.name: d for d in docs}
    assert by_name["little.shared"].signature == "little.shared(a, b=2)"
    assert by_name["little.Base.build"].signature == "little.Base.build(size=3)"
    assert by_name["little.Base.greet"].signature == ""  # its default shows a memory address
    assert by_name["little.Base.greet"].summary == "Greet a person by name."
    assert [d.kind for d in docs[:4]] == ["module", "module", "module", "class"]


def test_a_package_that_is_not_there_is_named() -> None:
    with pytest.raises(ForjaError, match="no_such_lib is not installed here; pip install no_such_lib"):
        sources.python_docs("no_such_lib")
    with pytest.raises(ForjaError, match="not installed"):
        sources.python_docs("../etc")


def collect(out: Path, cwd: Path, hash_seed: str) -> bytes:
    command = [sys.executable, "-s", "-P", "-S", "-X", "utf8", pydocs.__file__, str(out)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PYTHONHASHSEED": hash_seed}
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, cwd=cwd, env=environment, check=True, **quiet)
    return out.read_bytes()


def test_the_standard_library_gives_the_same_bytes_everywhere(tmp_path: Path) -> None:
    one = collect(tmp_path / "one.jsonl", tmp_path, "0")
    two = collect(tmp_path / "two.jsonl", Path("/"), "77")
    assert one == two
    assert b'"name": "json.dumps"' in one
    assert b'"name": "os.path.join"' in one  # not posixpath.join
    assert sys.prefix.encode() not in one
    assert one.count(b"\n") > 4000


@pytest.mark.parametrize(
    ("doc", "summary"),
    [
        ("Serialize ``obj`` to a JSON ``str``.\n\nMore.", "Serialize obj to a JSON str."),
        ("getpid(name) -> integer\n\nReturn the number of the process.", "Return the number of the process."),
        ("wsgiref -- a WSGI (PEP 3333) Reference Library", "A WSGI (PEP 3333) Reference Library."),
        ("return the name, e.g. that of a file, as it is", "Return the name, e.g. that of a file, as it is."),
        ("See :func:`~os.path.join` for this.", "See os.path.join for this."),
        ("Two sentences stand here. The second is cut.", "Two sentences stand here."),
        ("The commands are as follows:\n\n* one", ""),
        ("Point(x: int, y: int)", ""),
        ("Short.", ""),
        (">>> 1 + 1 is shown here as code", ""),
        ("word " * 60, ""),
    ],
)
def test_summary(doc: str, summary: str) -> None:
    assert sources.summary(doc) == summary


def test_chunks_keep_paragraphs_whole() -> None:
    assert sources.chunks("aaaa\n\nbbbb\n\ncccc", 10) == ["aaaa\n\nbbbb", "cccc"]
    assert sources.chunks("a" * 50, 10) == ["a" * 50]
    assert "".join(sources.chunks("x\n\ny\n\nz", 1)) == "xyz"
