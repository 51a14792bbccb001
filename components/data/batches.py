"""Which rows make which batch: a function of (seed, step) alone, so any step can be reached without the ones before."""

from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from components.artifact import ForjaError

Item = TypeVar("Item")


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation [n] of an epoch, drawn from the counter-based generator Philox (Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=epoch)).permutation(n)


@lru_cache(maxsize=8)
def kept_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The same, remembered: for tables of millions of rows."""
    return _kept(order(seed, epoch, n))


def _kept(permutation: np.ndarray) -> np.ndarray:
    """As it is remembered, so that a step costs the same in an epoch of millions: small, and not to be changed."""
    small = permutation.astype(np.uint32) if len(permutation) < 1 << 32 else permutation
    small.flags.writeable = False
    return small


def pick(seed: int, step: int, batch: int, n: int) -> list[int]:
    """The indices of batch `step`: epochs of all n rows, each in its own order, cut into batches back to back."""
    at = step * batch
    out: list[int] = []
    while len(out) < batch:
        epoch, start = divmod(at + len(out), n)
        out.extend(kept_order(seed, epoch, n)[start : start + batch - len(out)].tolist())
    return out


def windows(shard: Path, context: int, seed: int, step: int, batch: int) -> list[np.ndarray]:
    """Batch `step` of a shard of tokens (.npy): `batch` windows [context + 1] that overlap by the one shared token.

    Every epoch cuts the shard at another offset, so that a token is not always seen at one position.
    Raises ForjaError where the shard is shorter than two windows.
    """
    tokens = np.load(shard, mmap_mode="r")
    per_epoch = (len(tokens) - 1) // context - 1
    if per_epoch < 1:
        raise ForjaError(f"{shard}: {len(tokens)} tokens are fewer than two windows of {context}; ingest more text")
    out: list[np.ndarray] = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, index = divmod(position, per_epoch)
        offset, places = _epoch(seed, epoch, context, per_epoch)
        start = int(places[index]) * context
        out.append(np.asarray(tokens[offset + start : offset + start + context + 1], dtype=np.int64))
    return out


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, context: int, per_epoch: int) -> tuple[int, np.ndarray]:
    """Where an epoch begins to cut, and the order of its windows. Kept: drawing it takes longer than a small step."""
    rng = np.random.Generator(np.random.Philox(key=seed, counter=epoch))
    return int(rng.integers(context)), _kept(rng.permutation(per_epoch))


def bucketed(lengths: list[int], seed: int, step: int, batch: int, pool: int = 16) -> list[int]:
    """Batch `step` of rows of several lengths, about equally long ones together, so that little is padding.

    `pool` batches are drawn at a time, sorted by length, cut, and the pieces taken in a shuffled order.
    """
    group, member = divmod(step, pool)
    indices = pick(seed, group, batch * pool, len(lengths))
    indices.sort(key=lambda i: (lengths[i], i))
    piece = int(order(seed + 1, group, pool)[member])
    return indices[piece * batch : (piece + 1) * batch]
