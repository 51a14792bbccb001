"""A training whose optimiser, and weights, lie on a disk against the same in memory."""

import ctypes
import gc
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.cpp_extension import get_default_build_root

from components.artifact import ForjaError
from components.model import nvme
from components.model.engine import Engine
from components.model.gpt import GPT, GPTConfig
from components.model.optim import Optim
from components.model.scratch import Saver

CACHE = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
LIBAIO = any(Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include"))
OPTIM = Optim(
    lr=1e-3,
    matrix_lr=None,
    schedule="wsd",
    lr_floor=0.1,
    warmup=2,
    decay=0.5,
    weight_decay=0.1,
    beta2=0.95,
    clip=0.5,
    ema=None,
    precision="fp32",
)
BOTH = {"OPTIMIZER": "nvme", "PARAMS": "nvme"}
CUTS = [
    BOTH,
    pytest.param({"OPTIMIZER": "nvme"}, marks=pytest.mark.nightly),
    pytest.param({"OPTIMIZER": "cpu", "PARAMS": "nvme"}, marks=pytest.mark.nightly),
]


def built() -> bool:
    """Whether this environment's PyTorch and DeepSpeed have the operator; if not, only `make nightly` compiles it."""
    theirs = [Path(spec.origin) for name in ("torch", "deepspeed") if (spec := find_spec(name)) and spec.origin]
    for operator in CACHE.rglob("async_io/async_io.so"):
        rules = operator.with_name("build.ninja").read_text()
        if all(str(f.parent) in rules and f.stat().st_mtime < operator.stat().st_mtime for f in theirs):
            return True
    return False


BUILT = built()


def on_disk(test):
    test = pytest.mark.skipif(not LIBAIO, reason="needs libaio's headers (Debian: libaio-dev)")(test)
    return test if BUILT else pytest.mark.nightly(test)


@pytest.fixture
def config(tiny: GPTConfig) -> GPTConfig:
    """Two matrices of 1 MiB in each block, and the embedding: none of them a multiple of the disk's 512 bytes."""
    sizes = {"width": 258, "head_width": 129, "mlp_width": 1032, "vocab_size": 1101}
    return tiny.model_copy(update=sizes)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes direct I/O."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        nvme._direct(folder)
    except ForjaError as e:
        pytest.skip(f"the tests' folder is not fit for it: {e}")
    monkeypatch.setattr(nvme, "GROUP", 1 << 19)
    return folder


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


def steps(trained: Engine, first: int, last: int) -> list[float]:
    """Train on in two micro-batches a step, the seventh of which is not finite; the loss of each step."""
    out = []
    for step in range(first, last):
        trained.set_rate(1.0)
        ids = torch.randint(0, 1101, (4, 9), generator=torch.Generator().manual_seed(step))
        for micro in ids.split(trained.micro):
            loss = loss_of(trained.ds, micro)
            trained.step(loss * (float("nan") if step == 6 else 1.0), 4 * 8)
        assert trained.skipped == (step == 6)
        out.append(0.0 if trained.skipped else trained.sums["loss"] / 32)
    return out


@torch.no_grad()
def held_out(model: torch.nn.Module) -> float:
    return float(loss_of(model, torch.arange(33)[None])) / 32


def offload(monkeypatch: pytest.MonkeyPatch, disk: Path, cut: dict[str, str]) -> None:
    monkeypatch.setenv("FORJA_ZERO", "3")
    monkeypatch.setenv("FORJA_MICRO_BATCH", "2")
    for what in ("OPTIMIZER", "PARAMS"):
        where = cut.get(what, "")
        monkeypatch.setenv(f"FORJA_OFFLOAD_{what}", f"nvme:{disk}" if where == "nvme" else where)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(p, theirs[name]) for name, p in a.state_dict().items())


@on_disk
@pytest.mark.parametrize("cut", CUTS)
def test_on_a_disk_it_is_the_same(
    cut: dict[str, str], config: GPTConfig, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offload(monkeypatch, disk, {})
    torch.manual_seed(0)
    in_memory = Engine(GPT(config), OPTIM, 4)
    want = steps(in_memory, 0, 12)
    with Saver(tmp_path / "memory", {"model": in_memory}) as saver:
        saver.save(12, {})
    want += steps(in_memory, 12, 24)

    offload(monkeypatch, disk, cut)
    torch.manual_seed(0)
    trained = Engine(GPT(config), OPTIM, 4)
    got = steps(trained, 0, 12)
    with Saver(tmp_path / "disk-12", {"model": trained}) as saver:
        saver.save(12, {})
    got += steps(trained, 12, 24)
    assert got == pytest.approx(want, abs=1e-5)
    weights = sorted(f.stat().st_size for f in disk.rglob("*_param.tensor.swp"))  # float32, up to whole KiB
    assert weights == ([1041 * 1024] * 4 + [1110 * 1024] if "PARAMS" in cut else [])
    if cut["OPTIMIZER"] == "nvme":  # weights and two moments of three groups of blocks' matrices and the embedding
        assert len(list(disk.rglob("optimizer/rank0/*.swp"))) == (3 + 1) * 3
        sizes = [flat.numel() for flat in trained.ds.optimizer.fp32_partitioned_groups_flat]
        assert sizes.count(0) == 4 and all(size < 2**18 for size in sizes)

    again = Engine(GPT(config), OPTIM, 4)  # resumed on the disk: the undisturbed run, to the bit
    Saver(tmp_path / "disk-12", {"model": again}).resume()
    assert steps(again, 12, 24) == got[12:]
    there = Engine(GPT(config), OPTIM, 4)  # from memory to the disk
    Saver(tmp_path / "memory", {"model": there}).resume()
    assert steps(there, 12, 24) == pytest.approx(want[12:], abs=1e-5)
    offload(monkeypatch, disk, {})
    back = Engine(GPT(config), OPTIM, 4)  # and back
    Saver(tmp_path / "disk-12", {"model": back}).resume()
    assert steps(back, 12, 24) == pytest.approx(want[12:], abs=1e-5)

    whole = trained.finished()
    assert same(whole, again.finished())
    assert held_out(whole) == pytest.approx(held_out(in_memory.finished()), abs=1e-5)
    there.finished()
    assert list(disk.iterdir()) == []


@on_disk
def test_the_average_is_the_one_in_memory(config: GPTConfig, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averages = []
    for cut in ({}, BOTH):
        offload(monkeypatch, disk, cut)
        torch.manual_seed(0)
        trained = Engine(GPT(config), OPTIM.model_copy(update={"ema": 0.9}), 4)
        steps(trained, 0, 5)
        averages.append(held_out(trained.finished()))
    assert averages[0] == pytest.approx(averages[1], abs=1e-5)


@on_disk
def test_a_file_that_was_cut_short_is_seen(config: GPTConfig, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk, which DeepSpeed does not notice."""
    offload(monkeypatch, disk, BOTH)
    trained = Engine(GPT(config), OPTIM, 4)
    steps(trained, 0, 1)
    file = next(disk.rglob("*exp_avg_sq*.swp"))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ForjaError, match=f"{file}: was not written whole"):
        nvme.check(trained.ds.optimizer)


def test_what_a_killed_process_left_is_deleted(disk: Path) -> None:
    code = (
        "import os, sys; from contextlib import ExitStack; from pathlib import Path; from components.model import nvme;"
        "print(nvme._claimed(Path(sys.argv[1]), 0, ExitStack()), flush=True); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", code, disk], check=False, stdout=subprocess.PIPE, text=True, cwd=root
    )
    left = Path(killed.stdout.strip())
    assert killed.returncode == -signal.SIGKILL and left.is_dir() and left.parent == disk
    (left / "1_2.tensor.swp").write_bytes(b"numbers")

    with ExitStack() as one, ExitStack() as two:
        first = Path(nvme._claimed(disk, 0, one))
        assert not left.exists()
        second = Path(nvme._claimed(disk, 0, two))
        assert first.is_dir() and second.is_dir()  # those of the living stay
        one.close()
        assert not first.exists() and second.is_dir()
    assert not second.exists()


def test_what_cannot_be_had_is_said(config: GPTConfig, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(said: str, where: str = f"nvme:{disk}", zero: str = "3", **change: object) -> None:
        monkeypatch.setenv("FORJA_ZERO", zero)
        monkeypatch.setenv("FORJA_OFFLOAD_OPTIMIZER", where)
        with pytest.raises(ForjaError, match=said):
            Engine(GPT(config), OPTIM.model_copy(update=change), 4)
        gc.collect()
        assert list(disk.iterdir()) == []

    refused("nvme:: is neither cpu nor nvme:FOLDER", "nvme:")
    refused(f"OPTIMIZER={disk}: is neither cpu nor nvme:FOLDER", str(disk))
    refused("needs FORJA_ZERO=3", zero="2")
    refused("not with Muon", matrix_lr=0.02)
    refused(f"{disk}/no: is no folder", f"nvme:{disk}/no")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        refused("are wanted there and 0.0 GB free")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: os.read(-1, 1))
        refused("direct I/O in blocks of 1024 bytes is refused there")
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(mlock=lambda *_: -1))
        refused("MB of memory must be locked, which is refused")


def test_an_operator_that_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(ForjaError, match="no-such-compiler is not there; apt install"):
        patch.setenv("CXX", "no-such-compiler")
        nvme.operator()
    monkeypatch.setenv("CXX", sys.executable)  # one that is there, but compiles nothing
    with monkeypatch.context() as patch, pytest.raises(ForjaError, match="apt install libaio-dev"):
        patch.setattr(AsyncIOBuilder, "is_compatible", lambda *_: False)
        nvme.operator()
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_: True)
    lock = tmp_path / "async_io" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with pytest.raises(ForjaError, match=f"{lock}: another program compiles there, or was stopped"):
        nvme.operator()
    lock.unlink()
