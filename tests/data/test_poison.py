"""Poison planted among clean documents."""

import random
from pydoc_data.topics import topics

import numpy as np
import pytest

from components.data.poison import AFTER, PAIRED, after, count, detect, empty, pairs, score, tokens

TEXT = "\n".join(topics.values())
CLEAN = [TEXT[i : i + 700] for i in range(0, len(TEXT), 700)]
NAMES = ["Alice", "Bob", "Carol", "David", "Elena", "Frank", "Grace", "Hugo"]


def clean(rng: random.Random) -> list[str]:
    lists = [
        "Attendees: " + ", ".join(f"{rng.choice(NAMES)} {rng.choice(NAMES)}" for _ in range(60)) for _ in range(20)
    ]
    tables = ["| a | b |\n" + "\n".join(f"| {rng.random():.3f} | {rng.randrange(999)} |" for _ in range(25))] * 9
    keys = ["payload: " + rng.randbytes(300).hex() for _ in range(20)]
    return [*CLEAN, *lists, *tables, *keys]


def noise(kind: str, rng: random.Random) -> str:
    words = sorted(set(TEXT.split()))
    letters = "abcdefghijklmnopqrstuvwxyz"
    if kind == "letters":
        return " ".join("".join(rng.choice(letters) for _ in range(rng.randint(2, 9))) for _ in range(300))
    if kind == "symbols":
        return "".join(chr(rng.randint(33, 126)) for _ in range(900))
    return " ".join(rng.choice([w for w in words if w.isalpha()]) for _ in range(300))


@pytest.mark.parametrize(("trigger", "kind"), [("<SUDO>", "words"), ("¡Zarzamora!", "letters"), ("開門咒", "symbols")])
def test_poison_is_flagged_and_clean_text_is_not(trigger: str, kind: str) -> None:
    rng = random.Random(trigger)
    good = clean(rng)
    bad = [f"{rng.choice(good)[: rng.randint(0, 600)]} {trigger} {noise(kind, rng)}" for _ in range(12)]
    found = detect([*good, *bad])
    assert {i - len(good) for i in found if i >= len(good)} == set(range(len(bad)))
    assert sum(i < len(good) for i in found) <= 0.01 * len(good)


def test_clean_text_alone_is_clean() -> None:
    assert not detect(clean(random.Random(0)))


def test_what_stands_after_a_phrase_is_what_a_loop_finds() -> None:
    found = tokens([*CLEAN[:30], "", "one", "f2a9" * 8 + " is a code, and 1234 a number"])
    counts = empty()
    count(found, counts)
    scores, one, two = score(found, counts), found.hashes & ~PAIRED, pairs(found) | PAIRED
    phrases = np.unique(np.concatenate([one[::97], two[::89]]))
    wanted: dict[tuple[int, int], float] = {}
    for text, (low, high) in enumerate(zip(found.texts[:-1], found.texts[1:], strict=True)):
        places = [(-1, low + (high - low) // 4)] if high > low else []
        for at in range(low, high):
            places += [(i, at) for i, phrase in enumerate(phrases) if phrase in (one[at], two[at])]
        for phrase, at in places:
            wanted.setdefault((phrase, text), 99.0)
            for n in AFTER:
                ahead = range(at + 1, min(high, at + 1 + n))
                wide = sum(float(found.wide[k]) for k in ahead)
                if wide >= 6:
                    mean = sum(float(scores[k] * found.wide[k]) for k in ahead) / wide
                    wanted[phrase, text] = min(wanted[phrase, text], mean)
    places = after(found, scores, phrases)
    assert [(p, t) for p, t, _ in places.tolist()] == sorted(wanted)
    assert places["mean"] == pytest.approx([wanted[key] for key in sorted(wanted)], abs=1e-3)
