"""What a training keeps on a disk: its folder there, DeepSpeed's operator for it, and how its groups come in.

DeepSpeed's operator (async_io) does not look at what the kernel answers to a read or a write: a refused one goes by
without a word, and the training goes on with other numbers. So what may be refused is tried before the first step.
Gradients are not written: DeepSpeed holds them in memory anyway, and would read them to addresses that no disk takes.
"""

import ctypes
import fcntl
import logging
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.artifact import ForjaError

GROUP = 1 << 24  # numbers that are brought in at once, with their moments and gradients; a group is cut no finer
HELD = 8  # weights of 1 MiB or more that are in memory at once, where weights are on a disk too
BLOCK = 1024  # bytes: DeepSpeed reads and writes at multiples of this
logger = logging.getLogger("forja")


def settings(optimizer: Path | None, params: Path | None, sizes: Sequence[int], folders: ExitStack) -> dict[str, Any]:
    """DeepSpeed's words for what lies under `optimizer` and `params`; `sizes` are this rank's shares of the parameters.

    Raises ForjaError where the disk, the memory or the operator is not fit for it. `folders` deletes the swap files.
    """
    out: dict[str, Any] = {"sub_group_size": GROUP}
    lock, largest = 0, max(sizes)
    group = min(sum(sizes), GROUP + largest)
    if optimizer is not None:
        out["offload_optimizer"] = {"device": "nvme", "nvme_path": _claimed(optimizer, 12 * sum(sizes), folders)}
        lock += 4 * 4 * group  # weights, two moments and gradients
    if params is not None:
        words = {"max_in_cpu": 0, "buffer_count": HELD, "buffer_size": largest}
        out["offload_param"] = {"device": "nvme", "nvme_path": _claimed(params, 4 * sum(sizes), folders), **words}
        # Read ahead, or kept for later, more weights would be in memory than there are buffers.
        out |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
        lock += 4 * (HELD * largest + group)
    _lockable(lock)
    operator()
    return out


def _claimed(parent: Path, room: int, folders: ExitStack) -> str:
    """A new folder in `parent`, held by this process; those that dead ones have left are deleted."""
    if not parent.is_dir():
        raise ForjaError(f"{parent}: is no folder; make one on the disk that is meant")
    with _alone(parent):
        for left in parent.glob("forja-swap-*"):
            held = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            except BlockingIOError:
                pass  # its process lives
            finally:
                os.close(held)
        free = shutil.disk_usage(parent).free
        if free < room:
            raise ForjaError(f"{parent}: {room / 1e9:.1f} GB are wanted there and {free / 1e9:.1f} GB free; make room")
        folder = tempfile.mkdtemp(prefix="forja-swap-", dir=parent)
        held = os.open(folder, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
    folders.callback(_removed, folder, held, os.getpid())
    _direct(Path(folder))
    return folder


def _removed(folder: str, held: int, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process is at this place in `folder`; one that is killed here is no hindrance."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _direct(folder: Path) -> None:
    """Raises ForjaError where files in `folder` cannot be written past the page cache in blocks as DeepSpeed's."""
    path = folder / "tried"
    memory = memoryview(mmap.mmap(-1, mmap.PAGESIZE))
    try:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600)
        try:
            os.pwrite(file, memory[BLOCK : 2 * BLOCK], BLOCK)
        finally:
            os.close(file)
    except OSError as e:
        why = f"direct I/O in blocks of {BLOCK} bytes is refused there ({e.strerror})"
        raise ForjaError(f"{folder.parent}: {why}; choose a folder on another disk") from None
    path.unlink()


def _lockable(size: int) -> None:
    """Raises ForjaError where the process may not lock `size` bytes of memory: DeepSpeed would abort it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, size) as memory:
        start = (ctypes.c_char * size).from_buffer(memory)
        failed = libc.mlock(start, ctypes.c_size_t(size))
        del start  # before the mapping is closed, and with it unlocked
    if failed:
        why = f"{size / 1e6:.0f} MB of memory must be locked, which is refused ({os.strerror(ctypes.get_errno())})"
        raise ForjaError(f"offloading to a disk: {why}; raise `ulimit -l`, or offload to cpu")


def operator() -> None:
    """Load DeepSpeed's async_io; the first time ever it is compiled, which takes minutes.

    Raises ForjaError where it cannot be compiled, or where a compilation that was broken off has left its lock:
    PyTorch would wait for that without end.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import _get_build_directory

    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise ForjaError(f"offloading to a disk: needs a C++ compiler, and {compiler} is not there; apt install g++")
    builder = AsyncIOBuilder()
    if not builder.is_compatible():
        raise ForjaError("offloading to a disk: libaio and its headers are not there; apt install libaio-dev")
    folders = [Path(_get_build_directory(name, False)) for name in ("pin_memory", "async_io")]
    with _alone(folders[0].parent):  # where another rank compiles, this one waits for it
        for folder in folders:
            if (folder / "lock").exists():
                why = "another program compiles there, or was stopped as it did"
                raise ForjaError(f"{folder / 'lock'}: {why}; where none does, delete the file")
        if not (folders[1] / "async_io.so").exists():
            logger.info("compiling DeepSpeed's async_io, once for this machine: it takes minutes")
        path = os.environ.get("PATH", "")
        try:  # with the environment's ninja: to another version of it all that was compiled is out of date
            os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
            builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError) as e:
            lines = str(e).splitlines()
            why = next((line for line in lines if "error:" in line), lines[0])
            raise ForjaError(f"offloading to a disk: async_io cannot be compiled: {why}; offload to cpu") from None
        finally:
            os.environ["PATH"] = path


def keep_gradients(zero: Any) -> None:
    """Have DeepSpeed's `zero` leave gradients in memory, where they lie, and write no copy of them to a disk."""
    swapper = getattr(zero, "optimizer_swapper", None)
    if swapper is not None:

        def keep(parameter: Any, gradient_offsets: list[int], gradient_tensors: list[Tensor]) -> None:
            pairs = zip(gradient_offsets, gradient_tensors, strict=True)
            swapper.swap_params_info[parameter.ds_id].unswapped_gradients.update(pairs)

        swapper.swap_out_gradients = keep


@contextmanager
def brought_in(zero: Any, owner: Tensor, changed: bool) -> Iterator[None]:
    """Inside, the numbers of `owner`, a tensor that ZeRO 3's optimiser moves, and its moments are in memory.

    Changed ones are written back.
    """
    swaps = getattr(zero, "optimizer_swapper", None) is not None
    group = next(i for i, flat in enumerate(zero.fp32_partitioned_groups_flat) if flat is owner) if swaps else 0
    if not swaps or not zero._swappable_optimizer_subgroup(group):
        yield
        return
    zero._optimizer_states_and_gradient_swap_in(group)
    try:
        yield
    finally:
        (zero._optimizer_states_and_gradient_swap_out if changed else zero._release_swap_buffers)(group)


def check(zero: Any) -> None:
    """Raises ForjaError where a swap file of `zero` is shorter than what was to be written: the disk was full."""
    swapper = getattr(zero, "optimizer_swapper", None)
    for info in swapper.swap_params_info.values() if swapper is not None else ():
        for path in info.get_swap_paths():
            if os.path.getsize(path) < info.numel() * torch.float32.itemsize:
                raise ForjaError(f"{path}: was not written whole; make room there, then give the same command again")
