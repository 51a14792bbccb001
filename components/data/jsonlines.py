"""Files of JSON lines in shards: pieces that are read by themselves, and joined are the file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SIZE = 1 << 26  # bytes


class Shard(NamedTuple):
    """The lines that begin in bytes start to end of a table's file."""

    table: str
    path: Path
    name: str  # of the file, as reasons say it
    start: int
    end: int
    work: Path  # the folder that holds what is known of it

    @property
    def size(self) -> int:
        return self.end - self.start


def shards(files: Sequence[tuple[str, Path, str]], work: Path, size: int) -> list[Shard]:
    """The shards of (table, path, name), in their order, of `size` bytes each."""
    found: list[Shard] = []
    for table, path, name in files:
        whole = path.stat().st_size
        for start in range(0, whole, size):
            found.append(Shard(table, path, name, start, min(start + size, whole), work / f"{len(found):06d}"))
    return found


def lines(shard: Shard) -> Iterator[bytes]:
    """The shard's lines without their ends. A line ends at LF alone."""
    with shard.path.open("rb") as f:
        at = shard.start
        if at:  # the line that begins before belongs to the shard before
            f.seek(at - 1)
            at += len(f.readline()) - 1
        while at < shard.end and (line := f.readline()):
            at += len(line)
            yield line.removesuffix(b"\n")
