"""A folder without a record that fits its files does not exist for its readers."""

from pathlib import Path

import pytest

from components.artifact import (
    RECORD,
    Damaged,
    building,
    digest,
    fingerprint,
    read_record,
    to_json,
    write_atomic,
    write_record,
)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "sft"
    (folder / "docs").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "docs" / "index.html").write_text("<p>")
    (folder / "empty").touch()
    write_record(folder, "sft", config={"lr": 0.1}, code="abc", inputs={"pretrain": "d"}, metrics={"loss": 1.5})
    return folder


def test_a_record_says_what_the_folder_is(sealed: Path) -> None:
    record = read_record(sealed)
    assert record.stage == "sft" and record.metrics == {"loss": 1.5}
    assert sorted(record.files) == ["docs/index.html", "empty", "model.safetensors"]
    # sha256 of nothing, as every implementation gives it
    assert record.files["empty"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert record.fingerprint == fingerprint("sft", {"lr": 0.1}, "abc", {"pretrain": "d"})
    assert len(digest(sealed)) == 64


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"weightz"), "bytes are not the recorded ones"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "bytes are not the recorded ones"),
        (lambda f: (f / "empty").unlink(), "empty: missing"),
        (lambda f: (f / "docs" / "more").touch(), "docs/more: not in the record"),
        (lambda f: (f / RECORD).unlink(), "never finished"),
        (lambda f: (f / RECORD).write_text("{"), "not a record"),
        (lambda f: (f / RECORD).write_text('{"stage": "sft"}'), "not a record"),
    ],
)
def test_every_harm_is_named(sealed: Path, harm, said: str) -> None:  # type: ignore[no-untyped-def]
    harm(sealed)
    with pytest.raises(Damaged, match=said):
        read_record(sealed)


def test_a_fingerprint_moves_with_each_part() -> None:
    base = ("sft", {"lr": 0.1}, "abc", {"pretrain": "d"})
    others = [("ppo", *base[1:]), (base[0], {"lr": 0.2}, *base[2:]), (*base[:2], "abd", base[3]), (*base[:3], {})]
    assert len({fingerprint(*base), *(fingerprint(*other) for other in others)}) == 5
    assert fingerprint("s", {"a": 1, "b": 2}, "", {}) == fingerprint("s", {"b": 2, "a": 1}, "", {})


def test_what_is_not_finite_is_not_sealed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_record(tmp_path, "sft", metrics={"loss": float("nan")})
    assert not (tmp_path / RECORD).exists()


def test_building_gives_the_whole_folder_or_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(KeyboardInterrupt), building(out) as temporary:
        (temporary / "half").touch()
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "old").exists()
    with building(out) as temporary:
        (temporary / "new").touch()
        assert (out / "old").exists()  # the old one stands until the new one is whole
    assert [p.name for p in out.iterdir()] == ["new"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_atomic_write_leaves_no_trace(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", to_json({"ñ": 1}))
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ñ": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
