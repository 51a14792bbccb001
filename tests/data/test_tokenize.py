"""The tokenize stage on a few rows whose counts are known."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from components.artifact import ForjaError
from components.data import tokenize
from components.log import silent


def write_tables(folder: Path, splits: list[str]) -> None:
    corpus = [{"text": f"Document {i}: año y {'word ' * 20}", "split": s} for i, s in enumerate(splits)]
    talk = [{"split": "train", "messages": [{"role": "user", "content": "zzqq zzqq zzqq"}]}]
    for name, table in (("corpus", corpus), ("instructions", talk)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def test_shards_hold_the_documents(tmp_path: Path) -> None:
    write_tables(tmp_path, ["train", "train", "val", "test"])
    out = tmp_path / "out"
    out.mkdir()
    metrics = tokenize.run(tokenize.Config(vocab_size=300, min_frequency=1, tokenizer=None), tmp_path, out, silent)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    shard = np.load(out / "train.npy")
    texts = [tokenizer.decode(part.tolist()) for part in np.split(shard, np.flatnonzero(shard == 0) + 1)[:2]]
    assert [t.split(":")[0] for t in texts] == ["Document 0", "Document 1"]
    counts = json.loads((out / "tokens.json").read_text())
    assert counts["train"] == {"tokens": len(shard), "bytes": 2 * 119, "documents": 2}
    assert (out / "test.txt").read_text().startswith("Document 3: año")
    assert metrics["train.tokens"] == len(shard) and metrics["bytes_per_token"] > 1
    assert len(tokenizer.encode("zzqq").ids) < 4  # the turns were learnt from too


def test_a_split_without_rows_is_named(tmp_path: Path) -> None:
    write_tables(tmp_path, ["train", "val"])
    with pytest.raises(ForjaError, match="no row in the test split"):
        tokenize.run(tokenize.Config(vocab_size=300, min_frequency=1, tokenizer=None), tmp_path, tmp_path, silent)
