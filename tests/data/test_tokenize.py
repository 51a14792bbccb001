"""The tokenize stage on a few rows whose counts are known."""

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer

from components.artifact import ForjaError
from components.data import tokenize
from components.data.batches import windows
from components.data.chat import SPECIAL, encode_text, special
from components.data.encode import Encoder
from components.log import silent

LEARN = tokenize.Config(vocab_size=300, min_frequency=1, sample_mb=9, tokenizer=None)


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
    metrics = tokenize.run(LEARN, tmp_path, out, silent)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    shard = np.load(out / "train.npy")
    texts = [tokenizer.decode(part.tolist()) for part in np.split(shard, np.flatnonzero(shard == 0) + 1)[:2]]
    assert [t.split(":")[0] for t in texts] == ["Document 0", "Document 1"]
    counts = json.loads((out / "tokens.json").read_text())
    assert counts["train"] == {"tokens": len(shard), "bytes": 2 * 119, "documents": 2}
    assert np.load(out / "train.ends.npy").tolist() == (np.flatnonzero(shard == 0) + 1).tolist()
    assert (out / "test.txt").read_text().startswith("Document 3: año")
    assert metrics["train.tokens"] == len(shard) and metrics["bytes_per_token"] > 1
    assert len(tokenizer.encode("zzqq").ids) < 4  # the turns were learnt from too


def test_a_split_without_rows_is_named(tmp_path: Path) -> None:
    write_tables(tmp_path, ["train", "val"])
    with pytest.raises(ForjaError, match="no row in the test split"):
        tokenize.run(LEARN, tmp_path, tmp_path, silent)


OLMO = Path(__file__).parents[2] / ".." / "shared" / "data" / "tokenizer_olmo" / "allenai_gpt-neox-olmo-dolma-v1_5.json"
FROM = tokenize.Config(vocab_size=None, min_frequency=None, sample_mb=9, tokenizer="x")
NASTY = ["<|endoftext|>", "a<|padding|>b", "<|end|><|call|>{}<|result|>", "<|endoftext|><|end|>", "<|", "|>"]


@pytest.mark.skipif(not OLMO.is_file(), reason="shared/data/tokenizer_olmo is not there")
def test_a_tokenizer_that_is_there_is_used_and_no_text_makes_its_marks(tmp_path: Path) -> None:
    write_tables(tmp_path, ["train", "train", "val", "test"])
    out = tmp_path / "out"
    out.mkdir()
    tokenize.run(FROM, tmp_path, out, silent, tokenizer=OLMO)
    theirs, ours = Tokenizer.from_file(str(OLMO)), Tokenizer.from_file(str(out / "tokenizer.json"))
    n = theirs.get_vocab_size()
    assert [special(ours, name) for name in SPECIAL] == [50279, n, n + 1, n + 2]  # it has an <|endoftext|> of its own
    assert n == 50280
    shard = np.load(out / "train.npy")
    assert shard.dtype == np.uint16 and (shard == 50279).sum() == 2
    document = f"Document 0: año y {'word ' * 20}"
    assert shard[: len(theirs.encode(document).ids)].tolist() == theirs.encode(document).ids
    marks = {token.content: i for i, token in ours.get_added_tokens_decoder().items() if token.special}
    assert set(marks) == {*SPECIAL, "<|padding|>"}
    for text in NASTY:
        ids = encode_text(ours, text)
        assert not set(ids) & set(marks.values()) and ours.decode(ids) == text
    assert theirs.encode(NASTY[0]).ids == [50279]  # as it would have been


@pytest.mark.parametrize("texts", [NASTY, ["plain"]])
def test_a_shard_has_one_separator_a_document(texts: list[str]) -> None:
    shard = Encoder(small(), 0)(texts).ids
    assert (shard == 0).sum() == len(texts) and not ((shard > 0) & (shard < len(SPECIAL))).any()


def small() -> Tokenizer:
    return tokenize.train_bpe(["some words"], 300, 1)


def test_ids_beyond_65535_take_four_bytes(tmp_path: Path) -> None:
    large = small()
    large.add_tokens([f"zz{i}q" for i in range(70_000)])
    large.save(str(tmp_path / "large.json"))
    write_tables(tmp_path, ["train", "val", "test"])
    text = (tmp_path / "corpus.jsonl").read_text().replace("Document", "zz69999q")
    (tmp_path / "corpus.jsonl").write_text(text)
    tokenize.run(FROM, tmp_path, tmp_path, silent, tokenizer=tmp_path / "large.json")
    shard = np.load(tmp_path / "train.npy")
    assert shard.dtype == np.uint32 and shard.max() > 70_000
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(shard[:2].tolist()).startswith("zz69999q")
    assert windows(tmp_path / "train.npy", 10, 0, 0, 1)[0].dtype == np.int64
    assert max(int(w.max()) for w in windows(tmp_path / "train.npy", 5, 0, 0, 30)) > 70_000


def test_a_tokenizer_that_cuts_or_pads_is_taken_without(tmp_path: Path) -> None:
    cutting = small()
    cutting.enable_truncation(4)
    cutting.enable_padding(length=9)
    cutting.save(str(tmp_path / "given.json"))
    write_tables(tmp_path, ["train", "val", "test"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "given.json").rename(tmp_path / "folder" / "tokenizer.json")
    tokenize.run(FROM, tmp_path, tmp_path, silent, tokenizer=tmp_path / "folder")
    assert np.load(tmp_path / "train.npy").tolist() == [*encode_text(small(), f"Document 0: año y {'word ' * 20}"), 0]


def test_what_is_no_tokenizer_is_said(tmp_path: Path) -> None:
    write_tables(tmp_path, ["train", "val", "test"])
    (tmp_path / "bad.json").write_text("{}")
    for path, said in ((tmp_path / "bad.json", "no tokenizers file"), (tmp_path, "tokenizer.json is missing")):
        with pytest.raises(ForjaError, match=said):
            tokenize.run(FROM, tmp_path, tmp_path, silent, tokenizer=path)


@pytest.mark.parametrize(
    ("change", "said"), [({"tokenizer": "x"}, "to be null"), ({"vocab_size": None}, "must be numbers")]
)
def test_learning_and_naming_exclude_each_other(change: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        tokenize.Config(**{"vocab_size": 300, "min_frequency": 1, "sample_mb": 9, "tokenizer": None, **change})


def test_a_corpus_of_many_groups_becomes_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables(tmp_path, ["train", "val", "train", "test", "train", "val"] * 20)
    for name, chars in (("whole", 1 << 20), ("cut", 300)):
        monkeypatch.setattr(tokenize, "GROUP_CHARS", chars)
        (tmp_path / name).mkdir()
        tokenize.run(LEARN, tmp_path, tmp_path / name, silent)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert {"val.npy", "val.ends.npy", "val.txt", "test.txt", "tokens.json"} < set(names)
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    assert len(np.load(tmp_path / "cut" / "train.ends.npy")) == 60


def test_a_large_corpus_is_sampled_and_the_turns_are_not(tmp_path: Path) -> None:
    texts = [f"row {i} " + "x" * 2000 for i in range(1000)]
    lines = [json.dumps({"text": text, "split": "train" if i % 4 else "val"}) + "\n" for i, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    talk = {"split": "train", "messages": [{"role": "user", "content": "a turn"}]}
    (tmp_path / "instructions.jsonl").write_text(json.dumps(talk) + "\n")
    everything = list(tokenize.sample(tmp_path, 3))
    assert everything == [text for i, text in enumerate(texts) if i % 4] + ["a turn"]
    half = list(tokenize.sample(tmp_path, 1))
    assert half == list(tokenize.sample(tmp_path, 1)) and half[-1] == "a turn"
    assert 300 < len(half) < 440 and set(half) < set(everything)  # 1 MB of 2.05: 366 of 750


def test_bytes_per_token_are_told_by_language(tmp_path: Path) -> None:
    write_tables(tmp_path, ["train", "train"])
    rows = [{"text": "hola", "split": split, "lang": "es"} for split in ("val", "test")]
    rows += [{"text": "word word", "split": "test", "lang": "en"}]
    with (tmp_path / "corpus.jsonl").open("a") as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows))
    talk = {"split": "val", "lang": "es", "messages": [{"role": "user", "content": "sí"}]}
    with (tmp_path / "instructions.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps(talk, ensure_ascii=False) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    metrics = tokenize.run(LEARN, tmp_path, out, silent)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    spanish = sum(len(encode_text(tokenizer, text)) for text in ("hola", "hola", "sí"))
    assert metrics["bytes_per_token.es"] == (4 + 4 + 3) / spanish
    assert metrics["bytes_per_token.en"] == 9 / len(encode_text(tokenizer, "word word"))
    assert metrics["bytes_per_token"] == 13 / len(
        [*encode_text(tokenizer, "hola"), *encode_text(tokenizer, "word word")]
    )
