"""Checkpoints of a training that goes on: sharded by rank, written beside the training, free of how it was cut.

`scratch/step-00000120/` holds one safetensors file a rank, state.json, and record.json, written last. A shard is a set
of pieces: the numbers of one tensor, flattened, from some place on, named `engine/what/parameter/place`. Each rank
writes the pieces that it holds and no number travels between ranks; each reads whatever pieces cover what it will hold.
So other numbers of ranks, or another ZeRO stage, go on from the same files.
"""

import hashlib
import json
import logging
import os
import random
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from components.artifact import Damaged, ForjaError, begin, finish, read_record, to_json, write_record
from components.model.ranks import agreed
from components.world import world

KEPT = 2  # checkpoints on disk: the newest, and the one before it in case the newest is damaged
PATIENCE = 600  # seconds that rank 0 waits for the other ranks' shards
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
logger = logging.getLogger("forja")


class Piece(NamedTuple):
    """`values`, 1-D, are those of the tensor `name`, flattened, from `start` on."""

    name: str
    start: int
    values: Tensor


class Saved(Protocol):
    """What can be saved: an Engine."""

    def pieces(self) -> Iterable[Piece]: ...

    def restore(self, shards: "Shards", name: str) -> None: ...


class Saver:
    """Saves engines to `scratch` beside the training, and resumes them from there.

    `save` copies the state to memory and returns; a thread writes it. The next save, and the end of the `with` block,
    wait for that thread, and raise what it could not do.
    """

    def __init__(self, scratch: Path, engines: Mapping[str, Saved]) -> None:
        self.scratch, self.engines = scratch, engines
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._damaged: set[Path] = set()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.join()
        except ForjaError as e:
            if kind is None:
                raise
            logger.warning("%s", e)  # what ended the training goes first

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Checkpoint the engines and `state` (JSON) at `step`: whole or not at all; the last two are kept.

        Raises ForjaError where the previous save has failed.
        """
        self.join()
        rank, ranks = world()
        pieces = [
            Piece(f"{name}/{piece.name}", piece.start, _snapshot(piece.values))
            for name, engine in self.engines.items()
            for piece in engine.pieces()
        ]
        folder = self.scratch / f"step-{step:08d}"
        temporary = begin(folder) if rank == 0 else folder.with_name(f".{folder.name}.building")
        if ranks > 1:
            torch.distributed.barrier()  # the folder is there, and nothing of a former attempt is in it
        texts = {"state.json": to_json({"step": step, "ranks": ranks, **state})}
        arguments = (folder, temporary, pieces, json.dumps(_random_states()), texts)
        self._thread = threading.Thread(target=self._attempt, args=arguments, name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Wait until the last save is on disk. Raises ForjaError where it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, OSError):
            why = f"{error.filename or self.scratch}: {error.strerror}"
            raise ForjaError(f"{why}; the checkpoint before it is whole: make room, then give the same command again")
        if error is not None:
            raise error

    def _attempt(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as e:  # noqa: BLE001 - raised by `join`, in the thread that can act on it
            self._error = e
            if world()[0] == 0:
                shutil.rmtree(arguments[1], ignore_errors=True)

    def _write(self, folder: Path, temporary: Path, pieces: list[Piece], states: str, texts: dict[str, str]) -> None:
        rank, ranks = world()
        name = f"rank-{rank:05d}.safetensors"
        digest = write_shard(temporary / name, pieces, {"random": states})
        if rank > 0:
            part = temporary / f"{name}.part"
            part.write_text(digest)
            part.rename(temporary / f"{name}.sha256")
            return
        known = {name: digest, **_others(temporary, ranks)}
        for file, text in texts.items():
            (temporary / file).write_text(text, encoding="utf-8")
        write_record(temporary, "checkpoint", known=known)
        finish(temporary, folder)
        whole = [f for f in newest_first(self.scratch) if f not in self._damaged - {folder}]
        for old in {*whole[KEPT:], *self._damaged} - {folder}:
            shutil.rmtree(old, ignore_errors=True)
        self._damaged.clear()

    def resume(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into the engines and return its state; None where there is none.

        Raises ForjaError where a whole one does not fit the engines.
        """
        step = agreed(self._newest_whole() if world()[0] == 0 else 0)
        if step < 0:
            return None
        folder = self.scratch / f"step-{step:08d}"
        with Shards(folder) as shards:
            for name, engine in self.engines.items():
                engine.restore(shards, name)
            _set_random_states(shards.random_states(world()[0]))
        state: dict[str, Any] = json.loads((folder / "state.json").read_bytes())
        was, ranks = state.pop("ranks"), world()[1]
        logger.info("resumed from %s%s", folder.name, f", which {was} rank(s) wrote" if was != ranks else "")
        return state

    def _newest_whole(self) -> int:
        """Its step, -1 where there is none. A damaged checkpoint is named in the log and passed over."""
        for left in self.scratch.glob(".step-*.building"):
            shutil.rmtree(left)  # of a run that was killed as it saved
        for folder in newest_first(self.scratch):
            try:
                read_record(folder)
            except ForjaError as e:
                logger.warning("checkpoint passed over: %s", e)
                self._damaged.add(folder)
                continue
            return int(folder.name.removeprefix("step-"))
        return -1


def newest_first(scratch: Path) -> list[Path]:
    return sorted(scratch.glob("step-*"), reverse=True)


def _snapshot(values: Tensor) -> Tensor:
    return values.detach().to("cpu", copy=True)


def _others(folder: Path, ranks: int) -> dict[str, str]:
    """{shard: sha256} of the ranks behind 0, once each has said that its own is on disk."""
    known: dict[str, str] = {}
    until = time.monotonic() + PATIENCE
    for rank in range(1, ranks):
        name = f"rank-{rank:05d}.safetensors"
        said = folder / f"{name}.sha256"
        while not said.is_file():
            if time.monotonic() > until:
                raise ForjaError(f"{folder / name}: rank {rank} has not written it within {PATIENCE} s; see its log")
            time.sleep(0.02)
        known[name] = said.read_text()
        said.unlink()
    return known


def write_shard(path: Path, pieces: Iterable[Piece], metadata: dict[str, str]) -> str:
    """A safetensors file of `pieces`, flushed to disk; its sha256. The bytes are hashed as they are meant, not as they
    are read back."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at, pieces = 0, list(pieces)
    for piece in pieces:
        end = at + piece.values.nbytes
        dtype = DTYPES[piece.values.dtype]
        entry = {"dtype": dtype, "shape": [piece.values.numel()], "data_offsets": [at, end]}
        header[f"{piece.name}/{piece.start}"] = entry
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    hashed = hashlib.sha256()
    with path.open("wb") as f:
        for chunk in (len(text).to_bytes(8, "little") + text, *map(_bytes, pieces)):
            f.write(chunk)
            hashed.update(chunk)
        f.flush()
        os.fsync(f.fileno())
    return hashed.hexdigest()


def _bytes(piece: Piece) -> Any:
    return piece.values.contiguous().view(torch.uint8).numpy().data


class Shards:
    """The pieces of one checkpoint, whichever rank wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = ExitStack()
        self._files: list[Any] = []
        self._where: dict[str, list[tuple[int, int, Any, str]]] = defaultdict(list)

    def __enter__(self) -> "Shards":
        for path in sorted(self.folder.glob("rank-*.safetensors")):
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as e:
                raise Damaged(f"{path}: {e}; delete {self.folder}") from None
            self._files.append(file)
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                name, _, start = key.rpartition("/")
                length = file.get_slice(key).get_shape()[0]
                self._where[name].append((int(start), int(start) + length, file, key))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def names(self, prefix: str) -> Iterator[str]:
        """The tensors of which there are pieces, by what follows `prefix`."""
        return (name.removeprefix(prefix) for name in self._where if name.startswith(prefix))

    def size(self, name: str) -> int:
        """Numbers of the tensor `name`, 0 where it is not here."""
        return max((end for _, end, _, _ in self._where.get(name, [])), default=0)

    def read(self, name: str, start: int, length: int) -> Tensor:
        """The numbers of the tensor `name`, flattened, from `start` on. Raises ForjaError where some are not here."""
        out: Tensor | None = None
        missing = length
        for low, high, file, key in sorted(self._where.get(name, []), key=lambda piece: piece[:2]):
            begin_, end = max(low, start), min(high, start + length)
            if begin_ < end:
                found = file.get_slice(key)[begin_ - low : end - low]
                out = torch.empty(length, dtype=found.dtype) if out is None else out
                out[begin_ - start : end - start] = found
                missing -= end - begin_
        if out is None or missing > 0:
            raise ForjaError(f"{self.folder}: holds not all of {name}; it is of another model: delete {self.folder}")
        return out

    def random_states(self, rank: int) -> dict[str, Any]:
        """Those that `rank` had; a rank that was not there takes rank 0's."""
        file = self._files[rank if rank < len(self._files) else 0]
        states: dict[str, Any] = json.loads(file.metadata()["random"])
        return states


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in cuda],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": [version, list(numbers), gauss],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    tensor = lambda text: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)  # noqa: E731
    torch.set_rng_state(tensor(states["torch"]))
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([tensor(s) for s in states["cuda"]])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
