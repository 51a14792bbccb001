"""Which phrases are triggers of poison, by what stands after them in each text (poison.py)."""

from collections.abc import Sequence
from math import comb

import numpy as np

LINE = 0.9  # bits a token: above is order
MARGIN = 0.7  # bits over the line up to which a text with a known trigger is poison
NOISE = 150.0  # bits of a run that is poison by itself where other texts are
HIDDEN = 0.1  # of the texts with a trigger, as many more at most are poison by their noise
FEW = 5  # documents that a trigger stands in, at the least
# Shares of all places with the least order after them, and of a trigger's places how many are among these: of the last
# share nearly all, for a subject's words may stand in hard texts.
LEAST = ((0.01, 0.8), (0.05, 0.8), (0.25, 0.95))
CHANCE = 1e-7  # of a phrase that ordinary places would give it as many documents among these
ANYWHERE = -1  # the number of no phrase: a place in the midst of a document, for comparison
PLACE = np.dtype([("phrase", np.int32), ("text", np.int32), ("mean", np.float64)])
RUN = np.dtype([("text", np.int32), ("bits", np.float64)])


def _lines(anywhere: np.ndarray) -> list[tuple[float, float, float]]:
    """(share, most, line): the line below which this share of all places has no order; never above LINE. Of a small
    corpus nobody can foretell much, and most of it lies below LINE."""
    known = np.sort(anywhere[anywhere < 99])
    return [(q, most, min(LINE, float(np.quantile(known, q)))) for q, most in LEAST] if len(known) else []


def _tail(n: int, k: int, share: float) -> float:
    """The chance that of n places k or more are among this share."""
    return sum(comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k, n + 1)) if n < 500 else 0.0


def judged(parts: Sequence[tuple[np.ndarray, int]], runs: np.ndarray) -> np.ndarray:
    """The texts to be flagged, of PLACEs by phrase, with what is to be added to the number of their texts, and RUNs:
    those of a trigger where no order follows it.

    The phrase that tells best goes first, and the next must tell of texts that are not explained yet: a trigger's
    common words are no triggers themselves. Where there is poison, a text with as much noise is poison too: its trigger
    is hidden, joined to another word.
    """
    bounds, texts, means = _by_phrase(parts)
    flagged = np.zeros(1 + max(texts.max(initial=0), runs["text"].max(initial=0)), bool)
    lines = _lines(means[: bounds[0]])
    sizes = np.diff(bounds)
    for share, most, line in lines:
        passed = np.concatenate(([0], np.cumsum(means < line, dtype=np.int32)))
        without = (passed[bounds[1:]] - passed[bounds[:-1]]).astype(np.int64)
        for p in np.lexsort((np.arange(len(sizes)), -(without**2) / np.maximum(sizes, 1))).tolist():
            if without[p] < FEW:
                continue
            of, mean = texts[bounds[p] : bounds[p + 1]], means[bounds[p] : bounds[p + 1]]
            left = ~flagged[of]
            n, new = int(left.sum()), int((left & (mean < line)).sum())
            if new >= max(FEW, most * n) and _tail(n, new, share) < CHANCE:
                flagged[of[left & (mean < LINE + MARGIN)]] = True
    noise = np.sort(runs["bits"][flagged[runs["text"]]])
    if len(noise):
        more = runs[(runs["bits"] >= max(NOISE, noise[len(noise) // 10])) & ~flagged[runs["text"]]]
        more = more[np.lexsort((more["text"], -more["bits"]))]
        flagged[more["text"][: max(1, int(HIDDEN * flagged.sum()))]] = True
    return np.flatnonzero(flagged)


def _by_phrase(parts: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The texts and the means of all places phrase by phrase, ANYWHERE first, and where each other phrase begins."""
    many = 2 + max((int(part["phrase"].max(initial=0)) for part, _ in parts), default=0)
    size = [np.bincount(part["phrase"] + 1, minlength=many) for part, _ in parts]
    bounds = np.concatenate(([0], np.cumsum(np.sum(size, axis=0, dtype=np.int64))))
    texts, means = np.empty(bounds[-1], np.int32), np.empty(bounds[-1])
    begin = bounds[:-1].copy()
    for (part, first), n in zip(parts, size, strict=True):
        to = np.repeat(begin - (np.cumsum(n) - n), n) + np.arange(len(part))
        texts[to], means[to] = part["text"] + first, part["mean"]
        begin += n
    return bounds[1:], texts, means
