"""Checkpoints that are damaged, foreign or cut otherwise: the newest whole one is used, the rest are named."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import RECIPE, train

from components.artifact import ForjaError
from components.log import Metrics
from components.model.engine import Engine


class Killed(BaseException):
    """What a test throws in place of SIGKILL: nothing in the code under test catches it."""


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The scratch of a training that ended after step 7, with the checkpoints 4 and 6; and the undisturbed weights."""
    root = tmp_path_factory.mktemp("broken")

    def kill(_: Metrics, step: int) -> None:
        if step == 7:
            raise Killed

    with pytest.raises(Killed):
        train(root / "cut", kill)
    assert sorted(p.name for p in (root / "cut").iterdir()) == ["step-00000004", "step-00000006"]
    return root / "cut", train(root / "whole")[0]


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(len(data) - 1, int(len(data) * at))] ^= 1
    path.write_bytes(data)


def truncate(path: Path, to: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * to)])


def swap_shards(folder: Path) -> None:
    older = folder.with_name("step-00000004") / "rank-00000.safetensors"
    shutil.copy(older, folder / "rank-00000.safetensors")


SHARD = "rank-00000.safetensors"
DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"a bit of the shard at {at}": lambda f, at=at: flip(f / SHARD, at) for at in (0.0, 0.01, 0.5, 1.0)},  # type: ignore[misc]
    "a bit of the state": lambda f: flip(f / "state.json", 0.6),
    "a bit of the record": lambda f: flip(f / "record.json", 0.4),
    **{f"the shard cut to {to}": lambda f, to=to: truncate(f / SHARD, to) for to in (0.0, 0.3, 0.999)},  # type: ignore[misc]
    "the record cut": lambda f: truncate(f / "record.json", 0.5),
    "the state emptied": lambda f: truncate(f / "state.json", 0.0),
    "no record": lambda f: (f / "record.json").unlink(),
    "no shard": lambda f: (f / SHARD).unlink(),
    "a shard of another step": swap_shards,
    "a file that nobody wrote": lambda f: (f / "rank-00001.safetensors").write_bytes(b"?"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_the_one_before_it_is_used(
    what: str, broken_off: tuple[Path, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scratch, undisturbed = broken_off
    shutil.copytree(scratch, tmp_path / "s")
    DAMAGES[what](tmp_path / "s" / "step-00000006")
    steps: list[int] = []
    with caplog.at_level(logging.WARNING, logger="forja"):
        weights, _ = train(tmp_path / "s", lambda _, step: steps.append(step))
    assert steps == [5, 6, 7, 8, 9, 10, 11]
    assert "checkpoint passed over" in caplog.text and "step-00000006" in caplog.text
    for name, p in weights.items():
        assert torch.equal(p, undisturbed[name]), name
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["step-00000008", "step-00000010"]


def test_where_none_is_whole_the_training_begins_anew(
    broken_off: tuple[Path, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scratch, undisturbed = broken_off
    shutil.copytree(scratch, tmp_path / "s")
    for folder in (tmp_path / "s").iterdir():
        flip(folder / SHARD, 0.5)
    steps: list[int] = []
    weights, _ = train(tmp_path / "s", lambda _, step: steps.append(step))
    assert steps[0] == 1
    assert "step-00000004" in caplog.text and "step-00000006" in caplog.text
    assert all(torch.equal(p, undisturbed[name]) for name, p in weights.items())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"width": 8},
            r"step-00000006: blocks\.0\.attention\.out\.bias has 16 numbers there and 8 in this model; delete",
        ),
        ({"layers": 3}, r"step-00000006: blocks\.2\.\S+ has 0 numbers there and \d+ in this model; delete"),
        ({"layers": 1}, r"step-00000006: blocks\.1\.\S+ has \d+ numbers there and 0 in this model; delete"),
    ],
    ids=["narrower", "deeper", "shallower"],
)
def test_a_checkpoint_of_another_shape(
    other: dict, said: str, broken_off: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    shutil.copytree(broken_off[0], tmp_path / "s")
    with pytest.raises(ForjaError, match=said):
        train(tmp_path / "s", **other)


def test_another_optimiser_does_not_take_this_ones_state(
    broken_off: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Muon's momentum is no moment of AdamW's: no silent start from zeros."""
    shutil.copytree(broken_off[0], tmp_path / "s")
    with pytest.raises(ForjaError, match=r"step-00000006: .* is of another optimiser than AdamW; delete"):
        train(tmp_path / "s", cfg=RECIPE.model_copy(update={"matrix_lr": None}))


@pytest.mark.parametrize("zero", ["1", "2", "3"])
def test_another_zero_stage_goes_on(zero: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = RECIPE.model_copy(update={"matrix_lr": None})
    undisturbed, _ = train(tmp_path / "whole", cfg=cfg)

    def kill(_: Metrics, step: int) -> None:
        if step == 7:
            raise Killed

    for first, then in (("0", zero), (zero, "0")):
        monkeypatch.setenv("FORJA_ZERO", first)
        with pytest.raises(Killed):
            train(tmp_path / then, kill, cfg=cfg)
        monkeypatch.setenv("FORJA_ZERO", then)
        steps: list[int] = []
        weights, _ = train(tmp_path / then, lambda _, step, taken=steps: taken.append(step), cfg=cfg)  # type: ignore[misc]
        assert steps[0] == 7
        for name, p in weights.items():
            torch.testing.assert_close(p, undisturbed[name], atol=1e-5, rtol=0)


def test_what_the_thread_cannot_write_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.pieces

    def unknown(self: Engine):  # type: ignore[no-untyped-def]
        yield from real(self)
        yield next(real(self))._replace(values=torch.zeros(1, dtype=torch.complex64))

    monkeypatch.setattr(Engine, "pieces", unknown)
    with pytest.raises(KeyError, match="complex64"):
        train(tmp_path)
    assert not list(tmp_path.iterdir())
