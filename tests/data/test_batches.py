"""Sample order is a function of (seed, step)."""

from pathlib import Path

import numpy as np
import pytest

from components.artifact import ForjaError
from components.data import packing
from components.data.batches import bucketed, pick, windows
from components.model import ranks


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


class Counted:
    """A shard that counts the tokens that are read of it."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.read = tokens, 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, place: slice | int) -> np.ndarray:
        found = self.tokens[place]
        self.read += np.size(found)
        return found


def test_a_far_step_reads_the_tokens_of_its_own_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shard of 200,000 tokens, and whichever step it is."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 500, 200_000, dtype=np.uint16)
    ends = np.unique([*rng.integers(1, 200_000, 2000), 200_000])
    tokens[ends - 1] = 0
    shard = tmp_path / "train.npy"
    np.save(shard, tokens)
    np.save(tmp_path / "train.ends.npy", ends)
    plan = packing.pack(shard, 64)
    opened: list[tuple[Counted, str | None]] = []

    def load(path: Path, mmap_mode: str | None = None) -> Counted:
        opened.append((Counted(tokens), mmap_mode))
        return opened[-1][0]

    monkeypatch.setattr(np, "load", load)
    for step in (0, 7, 1_000_000, 10**12):
        opened.clear()
        windows(shard, 64, 5, step, 4)
        [(seen, mode)] = opened
        assert seen.read == 4 * 65 and mode == "r"  # it is mapped: what is not touched is not read
        opened.clear()
        filled = sum(sum(w.lengths) for w in packing.packed(plan, 5, step, 4))
        [(seen, mode)] = opened
        assert filled == 4 * 64 and seen.read <= 2 * filled + 4 and mode == "r"  # inputs and targets, and the separator


@pytest.mark.parametrize(("size", "many"), [(24, 1), (12, 2), (4, 2), (4, 3), (2, 4), (1, 6)])
def test_a_step_is_made_of_the_same_rows_on_any_number_of_ranks(
    size: int, many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "train.npy", np.arange(5000, dtype=np.uint16))
    for step in (0, 3, 100_000):
        of_step = {
            "rows": pick(7, step, 24, 1000),
            "windows": [int(w[0]) for w in windows(tmp_path / "train.npy", 10, 7, step, 24)],
            "bucketed": bucketed([i % 50 for i in range(1000)], 7, step, 24),
        }
        for wanted in of_step.values():
            seen: list[int] = []
            for rank in range(many):
                monkeypatch.setattr(ranks, "world", lambda at=rank: (at, many))
                blocks = ranks.split(wanted, size)
                assert len(blocks) * size * many == 24
                seen += [row for block in blocks for row in block]
            assert sorted(seen) == sorted(wanted)
