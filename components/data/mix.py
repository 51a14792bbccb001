"""What a recipe says of its sources: their weights, licences and split, and whom it leaves out.

A weight is a share: of a source whose weight is half the largest one's, half of the records are drawn, by a hash of
their place. The source of the largest weight is taken whole, and nothing is repeated: copies would be duplicates.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, field_validator

from components.artifact import ForjaError
from components.data.language import AUTO
from components.data.rules import LANGS
from components.data.shapes import SHAPES
from components.data.sources import hashed

TABLES = ("corpus", "instructions", "preferences", "prompts", "eval")
POLICY = ("not drawn", "excluded", "licence")  # reasons that are the recipe's will, not a record's fault


class Source(BaseModel, frozen=True, extra="forbid"):
    """One source: python-docs, problems, a file, a folder, a glob, hf:org/name. Null is recognised or filled in: `lang`
    by a file's first records, and with auto by each row."""

    source: str
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    shape: str | None = None
    table: Literal["corpus", "instructions", "preferences", "prompts", "eval"] | None = None
    licence: str | None = None
    lang: str | None = None
    split: Literal["auto", "hash", "train", "val", "test"] = "auto"

    @field_validator("shape")
    @classmethod
    def known(cls, shape: str | None) -> str | None:
        if shape is not None and shape not in SHAPES:
            raise ValueError(f"one of {', '.join(SHAPES)} is wanted")
        return shape

    @field_validator("lang")
    @classmethod
    def spoken(cls, lang: str | None) -> str | None:
        if lang is not None and lang not in (AUTO, *LANGS):
            raise ValueError(f"one of {', '.join((AUTO, *LANGS))} is wanted")
        return lang


class Will(NamedTuple):
    """Whom the recipe leaves out of a source, and which share of it is drawn."""

    share: float
    licences: frozenset[str] | None
    sources: tuple[str, ...]
    ids: frozenset[str]

    def against(self, place: str, own: Mapping[str, Any], source: str, licence: str, row_id: str) -> str | None:
        """Why a record does not go in, or None. `own` are the fields that it brings itself."""
        if self == OPEN:
            return None
        if self.share < 1 and hashed(f"draw/{place}") / 2**64 >= self.share:
            return "not drawn: the source's weight"
        if self.licences is not None and licence not in self.licences:
            return f"licence: {licence} is none of those allowed"
        if any(fnmatchcase(source, pattern) for pattern in self.sources):
            return f"excluded: source {source}"
        if self.ids and (row_id in self.ids or str(own.get("id")) in self.ids):
            return "excluded: its id opted out"
        return None


OPEN = Will(1.0, None, (), frozenset())


def read_ids(path: str | None) -> frozenset[str]:
    """The ids in a file, one a line."""
    if path is None:
        return frozenset()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise ForjaError(
            f"ingest.exclude_ids: {path} cannot be read ({e}); give a text file of one id a line"
        ) from None
    return frozenset(line.strip() for line in text.split("\n") if line.strip())


def labels(sources: list[str]) -> list[str]:
    """A short name for each source, unlike the others': the last part of its path."""
    found: list[str] = []
    for source in sources:
        path = source.removeprefix("hf:").replace("/", "-") if source.startswith("hf:") else Path(source).name or "data"
        name = stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in path)
        several = 2
        while name in found:
            name = f"{stem}-{several}"
            several += 1
        found.append(name)
    return found
