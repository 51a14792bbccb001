"""Sets of the hub, by a stand-in for its loader that gives the real types of `datasets`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.artifact import ForjaError, read_record
from components.data.hfsets import parse
from components.data.ingest import Config, ingest
from components.log import silent

REST = {"licences": None, "exclude_sources": [], "exclude_ids": None}
REST |= {"seed": 0, "package": None, "problems": 0, "limit": None}


def test_what_the_name_says() -> None:
    assert parse("hf:org/name") == ("org/name", None, None)
    assert parse("hf:org/name:es@v1.2") == ("org/name", "es", "v1.2")
    with pytest.raises(ForjaError, match="names no set"):
        parse("hf:")


def test_a_set_is_streamed_with_its_splits_and_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(name: str, config: str | None, **how: Any) -> Any:
        asked.append((name, config, how))
        train = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(50)] + [{"question": "nul", "answer": "a\0"}]
        parts = {"train": train, "test": train[:7]}
        made = {k: datasets.Dataset.from_list(v).to_iterable_dataset() for k, v in parts.items()}
        return datasets.IterableDatasetDict(made)

    def dataset_info(name: str, revision: str | None) -> Any:
        assert (name, revision) == ("org/name", "abc")
        return SimpleNamespace(card_data=SimpleNamespace(license="mit"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.dataset_info", dataset_info)
    cfg = Config.model_validate({"sources": [{"source": "hf:org/name:main@abc"}], **REST})
    ingest(cfg, tmp_path / "data", silent)
    assert asked == [("org/name", "main", {"revision": "abc", "streaming": True})]
    label = "org-name_main_abc"
    rows = [json.loads(x) for x in (tmp_path / "data" / "instructions" / f"{label}.jsonl").open("rb")]
    assert [r["messages"][1]["content"] for r in rows] == [f"a{i}" for i in [*range(50), *range(7)]]
    assert {r["licence"] for r in rows} == {"mit"}
    assert rows[0]["line"] == f"{label}/train:1" and {r["split"] for r in rows[50:]} == {"test"}
    assert {r["split"] for r in rows[:50]} == {"train", "val", "test"}
    [away] = [json.loads(x) for x in (tmp_path / "data" / "quarantine.jsonl").open("rb")]
    assert (away["file"], away["line"], away["reason"]) == (f"{label}/train", 51, "damaged text: NUL")
    metrics = read_record(tmp_path / "data").metrics
    assert [metrics[f"{label}.{k}"] for k in ("read", "kept", "quarantined")] == [58, 57, 1]


def test_a_set_that_the_hub_does_not_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cfg = Config.model_validate({"sources": [{"source": "hf:org/none"}], **REST})
    with pytest.raises(ForjaError, match=r"hf:org/none: the hub does not give it \(Dataset 'org/none' doesn't exist"):
        ingest(cfg, tmp_path / "data", silent)
    assert not (tmp_path / "data").exists()
