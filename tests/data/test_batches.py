"""Sample order is a function of (seed, step)."""

from pathlib import Path

import numpy as np
import pytest

from components.artifact import ForjaError
from components.data.batches import bucketed, pick, windows


def test_an_epoch_takes_every_row_once() -> None:
    seen = [i for step in range(5) for i in pick(7, step, 4, 10)]
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert pick(7, 3, 4, 10) == seen[12:16]  # any step, without the ones before
    assert pick(8, 0, 10, 10) != pick(7, 0, 10, 10)


def test_a_batch_may_be_larger_than_the_table() -> None:
    assert sorted(pick(0, 0, 6, 3)) == [0, 0, 1, 1, 2, 2]


def test_windows_are_pieces_of_the_shard(tmp_path: Path) -> None:
    shard = tmp_path / "train.npy"
    np.save(shard, np.arange(100, dtype=np.uint16))
    epoch = [w for step in range(3) for w in windows(shard, 10, 5, step, 3)][:8]
    starts = [int(w[0]) for w in epoch]
    assert all(w.tolist() == list(range(s, s + 11)) for w, s in zip(epoch, starts, strict=True))
    assert len({s % 10 for s in starts}) == 1 and len(set(starts)) == 8  # one offset an epoch, no window twice
    assert windows(shard, 10, 5, 2, 3)[0].tolist() == epoch[6].tolist()


def test_a_far_step_reads_nothing_before_it(tmp_path: Path) -> None:
    shard = tmp_path / "train.npy"
    np.save(shard, np.arange(100, dtype=np.uint16))
    for i, got in enumerate(windows(shard, 10, 5, 1_000_000, 3)):
        epoch, index = divmod(3_000_000 + i, 8)
        rng = np.random.Generator(np.random.Philox(key=5, counter=epoch))
        start = int(rng.integers(10)) + 10 * int(rng.permutation(8)[index])
        assert got.tolist() == list(range(start, start + 11))


def test_a_shard_too_short_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.zeros(12, dtype=np.uint16))
    with pytest.raises(ForjaError, match=r"train.npy: 12 tokens are fewer than two windows of 10"):
        windows(tmp_path / "train.npy", 10, 0, 0, 1)


def test_buckets_hold_like_lengths_and_every_row() -> None:
    lengths = [(i * 37) % 64 + 1 for i in range(64)]
    batches = [bucketed(lengths, 3, step, 4) for step in range(16)]
    assert sorted(i for b in batches for i in b) == list(range(64))
    assert max(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) <= 4
