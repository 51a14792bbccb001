"""Packing: every token once, the textbook's best-fit decreasing, windows by (seed, step) alone."""

from pathlib import Path

import numpy as np
import pytest

from components.artifact import ForjaError
from components.data import batches, packing
from components.data.packing import best_fit, pack, packed, pieces, truncated


def slow_best_fit(lengths: list[int], room: int) -> list[int]:
    """The rooms left, sorted, after best-fit decreasing one item at a time."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, r in enumerate(left) if r >= length]
        if fitting:
            left[min(fitting, key=lambda i: left[i])] -= length
        else:
            left.append(room - length)
    return sorted(left)


@pytest.mark.parametrize("room", [1, 7, 64, 1000])
def test_the_bins_are_those_of_the_plain_algorithm(room: int) -> None:
    rng = np.random.default_rng(room)
    for n in (0, 1, 5, 60, 700):
        for top in (room, max(1, room // 3), max(1, room // 20)):
            lengths = np.minimum(rng.geometric(1 / (top / 2 + 1), n), top)
            bins, used = best_fit(lengths, room)
            filled = np.bincount(bins, weights=lengths, minlength=used)
            assert sorted((room - filled).astype(int).tolist()) == slow_best_fit(lengths.tolist(), room)


def test_documents_are_cut_at_the_context_alone() -> None:
    start, length = pieces(np.array([3, 13, 14, 22]), 4)
    assert start.tolist() == [0, 3, 7, 11, 13, 14, 18]
    assert length.tolist() == [3, 4, 4, 2, 1, 4, 4]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """90 documents of tokens that are all different, each ended by 0."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(2, 40, 90)
    ends = np.cumsum(sizes)
    tokens = np.arange(1, ends[-1] + 1, dtype=np.uint16)
    tokens[ends - 1] = 0
    np.save(tmp_path / "train.npy", tokens)
    np.save(tmp_path / "train.ends.npy", ends)
    return tmp_path / "train.npy"


def test_an_epoch_predicts_every_token_once_from_its_own_document(shard: Path) -> None:
    tokens, plan = np.load(shard), pack(shard, 24)
    seen = []
    for window in packed(plan, 5, 0, len(plan)):
        assert sum(window.lengths) == 24 and len(window.ids) == len(window.targets) == 24
        at = 0
        for n in window.lengths:
            ids, targets = window.ids[at : at + n], window.targets[at : at + n]
            at += n
            if (targets == -1).any():
                assert (targets == -1).all() and at == 24  # what is left, at the end
                continue
            assert ids[1:].tolist() == targets[:-1].tolist()
            ended = targets == 0
            assert not ended[:-1].any()  # no second document in a piece
            place = int(targets[0]) - 1 if targets[0] else int(ids[0])  # a token is the number of its place, and one
            assert tokens[place] == targets[0] and tokens[place - 1] == ids[0]  # before the first is the last, a 0
            seen += targets.tolist()
    assert sorted(seen) == sorted(tokens.tolist())
    filled = sum(w.lengths[-1] for w in packed(plan, 5, 0, len(plan)) if w.targets[-1] == -1)
    assert plan.waste == pytest.approx(filled / (24 * len(plan)))


def test_any_step_is_reached_without_the_ones_before(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pack(shard, 24)
    steps = [[w.targets.tolist() for w in packed(plan, 5, step, 4)] for step in range(3 * len(plan))]
    one_after_another = [w for step in steps for w in step]
    for epoch in range(3):
        part = one_after_another[epoch * len(plan) : (epoch + 1) * len(plan)]
        assert sorted(part) == sorted(one_after_another[: len(plan)])
    assert one_after_another[: len(plan)] != one_after_another[len(plan) : 2 * len(plan)]
    two_ranks = [packed(plan, 5, 7, 4)[rank::2] for rank in (0, 1)]
    assert sorted(w.targets.tolist() for part in two_ranks for w in part) == sorted(steps[7])
    batches.kept_order.cache_clear()
    drawn = []
    draw = np.random.Generator
    monkeypatch.setattr(np.random, "Generator", lambda bits: drawn.append(bits) or draw(bits))
    far = packed(plan, 5, 1_000_000, 4)
    assert len(drawn) <= 2  # of the millions of windows before, nothing is looked at
    at = [(1_000_000 * 4 + i) for i in range(4)]
    wanted = [
        packing.window(plan, np.load(shard), int(batches.order(5, p // len(plan), len(plan))[p % len(plan)]))
        for p in at
    ]
    assert [w.targets.tolist() for w in far] == [w.targets.tolist() for w in wanted]


def test_what_is_cut_is_counted(shard: Path) -> None:
    ends = np.load(shard.with_suffix(".ends.npy"))
    by_hand = [0, 0]
    for end, start in zip(ends, [0, *ends[:-1]], strict=True):
        by_hand[0] += end - start > 24
        by_hand[1] += len({place // 24 for place in range(start, end)}) > 1
    assert truncated(ends, 24) == (by_hand[0] / 90, by_hand[1] / 90)


def test_a_shard_without_its_ends_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.arange(9))
    with pytest.raises(ForjaError, match=r"train\.ends\.npy: missing"):
        pack(tmp_path / "train.npy", 4)
