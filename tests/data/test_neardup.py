"""Near-duplicates against exact Jaccard similarities of word sets."""

import random

import numpy as np

from components.data import neardup
from components.data.words import cut


def texts() -> list[str]:
    rng = random.Random(3)
    words = ["".join(rng.choice("abcdefgh") for _ in range(5)) for _ in range(900)]
    base = [" ".join(rng.choice(words) for _ in range(120)) for _ in range(60)]
    changed = []
    for i, text in enumerate(base):
        found = text.split()
        for _ in range(i % 12):
            found[rng.randrange(120)] = rng.choice(words)
        changed.append(" ".join(found))
    return base + changed


def jaccard(a: str, b: str) -> float:
    sets = [{tuple(t.split()[i : i + 5]) for i in range(len(t.split()) - 4)} for t in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_every_pair_over_the_threshold_is_found_and_none_far_below() -> None:
    all_texts = texts()
    signed = neardup.of_texts(all_texts, 0.8)
    found = {tuple(sorted(p)) for p in neardup.pairs(iter(signed.bands), signed.bytes, 0.8).tolist()}
    true = {
        (i, j): jaccard(all_texts[i], all_texts[j]) for i in range(len(all_texts)) for j in range(i + 1, len(all_texts))
    }
    assert {p for p, j in true.items() if j >= 0.8} <= found
    assert all(true[p] > 0.5 for p in found)  # type: ignore[index]
    assert 20 <= len(found) < 60


def test_case_accents_and_punctuation_make_no_difference_and_order_does() -> None:
    one = "El niño comió una manzana roja en la cocina de su abuela ayer"
    two = "el nino comio, una MANZANA roja; en la cocina de su abuela - ayer!"
    signed = neardup.of_texts([one, two, " ".join(reversed(one.split())), "hola", "Hola.", ""], 0.8)
    pairs = neardup.pairs(iter(signed.bands), signed.bytes, 0.8).tolist()
    assert sorted(map(tuple, pairs)) == [(0, 1), (3, 4)]


def test_clusters_join_chains_at_their_first_text() -> None:
    found = np.array([[4, 5], [1, 4], [2, 3]])
    assert neardup.clusters(7, found).tolist() == [0, 1, 2, 2, 1, 1, 6]


def test_words_are_folded_and_cut() -> None:
    words = cut(["Años 2 + 2, don't", "日本 e\u0301x"])
    found = ["".join(map(chr, words.chars[s:e])) for s, e in zip(words.starts[:-1], words.starts[1:], strict=True)]
    assert found == ["anos", "2", "+", "2", "don", "t", "日", "本", "ex"] and words.texts.tolist() == [0, 6, 9]
