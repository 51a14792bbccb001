"""kill -9 at any moment: the same training, started again, ends in the undisturbed one's bytes."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from conftest import Break

from components.artifact import ForjaError, read_record, sha256

KILL = -signal.SIGKILL


def whole(scratch: Path) -> list[int]:
    """The steps of the whole checkpoints, by the record alone."""
    steps = []
    for folder in scratch.glob("step-*"):
        try:
            read_record(folder)
            steps.append(int(folder.name[5:]))
        except ForjaError:
            pass
    return sorted(steps)


def ends_well(train_in_child: Break, undisturbed: dict[str, str], scratch: Path, out: Path) -> list[int]:
    """Start again; the steps that were then taken. What is saved is where it goes on: no step before it is taken."""
    saved = whole(scratch)
    assert train_in_child(scratch, out, {}) == 0
    assert {name: sha256(out / name) for name in undisturbed} == undisturbed
    taken: list[int] = json.loads((out / "steps.json").read_text())
    assert taken == list(range((saved or [0])[-1] + 1, 12))
    assert not list(scratch.glob(".step-*"))  # nothing half-written is left lying
    return taken


@pytest.mark.parametrize("step", sorted(random.Random(7).sample(range(1, 11), 5)))
def test_in_steps(step: int, train_in_child: Break, undisturbed: dict[str, str], tmp_path: Path) -> None:
    status = train_in_child(tmp_path / "s", tmp_path / "no", {"step": step, "signal": signal.SIGKILL})
    assert status == KILL and not (tmp_path / "no").exists()
    ends_well(train_in_child, undisturbed, tmp_path / "s", tmp_path / "out")


def test_again_and_again(train_in_child: Break, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """One training that dies ten times, at moments that nobody chose."""
    rng = random.Random(11)
    for _ in range(10):
        if train_in_child(tmp_path / "s", tmp_path / "no", {"after": rng.uniform(0.02, 0.3)}) == 0:
            shutil.rmtree(tmp_path / "no")
    ends_well(train_in_child, undisturbed, tmp_path / "s", tmp_path / "out")


def at_event(n: int, train_in_child: Break, undisturbed: dict[str, str], root: Path) -> bool:
    """Whether the training was still alive when it touched its checkpoints for the n-th time, and was killed there."""
    status = train_in_child(root / "s", root / "no", {"event": n})
    if status == 0:
        return False
    assert status == KILL
    ends_well(train_in_child, undisturbed, root / "s", root / "out")
    return True


def test_in_saves_between_two_files(train_in_child: Break, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """At an eighth of all moments when a file of a checkpoint is opened, renamed or removed."""
    n = 1
    while at_event(n, train_in_child, undisturbed, tmp_path / str(n)):
        n += 8
    assert n > 40  # five saves, the later ones with the removal of the oldest


@pytest.mark.nightly
def test_in_saves_between_any_two_files(train_in_child: Break, undisturbed: dict[str, str], tmp_path: Path) -> None:
    n = 1
    while at_event(n, train_in_child, undisturbed, tmp_path / str(n)):
        n += 1
    assert n > 40


def shard_size(train_in_child: Break, root: Path) -> int:
    train_in_child(root / "s", root / "no", {"step": 6, "signal": signal.SIGKILL})
    return next((root / "s").rglob("rank-*.safetensors")).stat().st_size


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["some", "many"])
def test_in_saves_within_a_file(few: bool, train_in_child: Break, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """The kernel ends the process at byte k of the shard of the checkpoint after step 4."""
    size = shard_size(train_in_child, tmp_path / "size")
    drawn = random.Random(13).sample(range(size), 2 if few else 60)
    for k in [0, 1, 8, size - 1, *drawn]:
        root = tmp_path / str(k)
        train_in_child(root / "s", root / "no", {"step": 5, "signal": signal.SIGKILL})
        before = whole(root / "s")
        assert train_in_child(root / "s", root / "no", {"byte": k}) == -signal.SIGXFSZ
        assert whole(root / "s") == before
        ends_well(train_in_child, undisturbed, root / "s", root / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_loses_no_step(
    number: int, train_in_child: Break, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    assert train_in_child(tmp_path / "s", tmp_path / "cut", {"step": 5, "signal": number}) == 128 + number
    kind, said = json.loads((tmp_path / "cut" / "error.json").read_text())
    assert kind == "Interrupted" and "saved at step 5 of 11" in said
    assert whole(tmp_path / "s")[-1] == 5
    assert ends_well(train_in_child, undisturbed, tmp_path / "s", tmp_path / "out")[0] == 6


def test_a_write_that_is_refused(train_in_child: Break, undisturbed: dict[str, str], tmp_path: Path) -> None:
    train_in_child(tmp_path / "s", tmp_path / "no", {"step": 5, "signal": signal.SIGKILL})
    before = whole(tmp_path / "s")
    assert train_in_child(tmp_path / "s", tmp_path / "refused", {"full": 9000}) == 2
    kind, said = json.loads((tmp_path / "refused" / "error.json").read_text())
    assert kind == "ForjaError" and "File too large; the checkpoint before it is whole: make room" in said
    assert whole(tmp_path / "s") == before
    ends_well(train_in_child, undisturbed, tmp_path / "s", tmp_path / "out")


def test_a_full_disk(train_in_child: Break, undisturbed: dict[str, str], tmp_path: Path) -> None:
    size = shard_size(train_in_child, tmp_path / "size")
    disk = tmp_path / "disk"
    disk.mkdir()
    room = f"size={2 * size + size // 2 + 40_000}"  # for two checkpoints and half of a third
    if os.geteuid() or os.system(f"mount -t tmpfs -o {room} forja {disk} 2>/dev/null"):  # noqa: S605
        pytest.skip("no file system may be mounted here")
    try:
        assert train_in_child(disk / "s", tmp_path / "full", {}) == 2
        kind, said = json.loads((tmp_path / "full" / "error.json").read_text())
        assert kind == "ForjaError" and "No space left on device; the checkpoint before it is whole" in said
        assert whole(disk / "s") == [2, 4]
        assert os.system(f"mount -o remount,size=64m {disk}") == 0  # noqa: S605
        assert ends_well(train_in_child, undisturbed, disk / "s", tmp_path / "out")[0] == 5
    finally:
        os.system(f"umount {disk}")  # noqa: S605
