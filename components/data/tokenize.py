"""Tokenize: a byte-level BPE learnt from the training rows, and each split's documents as one packed shard.

Bytes are the base alphabet, so every string round-trips. Digits stand alone: numbers are read place by place.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from components.artifact import ForjaError, to_json
from components.data.chat import SEPARATOR, SPECIAL, encode_text, special
from components.log import Log

SPLITS = ("train", "val", "test")


class Config(BaseModel, frozen=True, extra="forbid"):
    vocab_size: int = Field(ge=256 + len(SPECIAL), le=65536)  # shards are uint16
    min_frequency: int = Field(ge=1)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL table. Rows end at "\\n" alone: a string may hold U+2028."""
    with path.open("rb") as f:
        for line in f:
            yield json.loads(line)


def train_bpe(texts: list[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) with forja's special tokens as its first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The texts' tokens [n] as uint16, each document followed by the separator."""
    tokenizer.encode_special_tokens = True
    separator = special(tokenizer, SEPARATOR)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(separator)
    return np.asarray(ids, dtype=np.uint16)


def run(cfg: Config, validate: Path, out: Path, log: Log) -> dict[str, float]:
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for row in rows(validate / "corpus.jsonl"):
        documents[row["split"]].append(row["text"])
    for split in SPLITS:
        if not documents[split]:
            raise ForjaError(f"{validate}/corpus.jsonl: no row in the {split} split; ingest more documents")

    # The turns that SFT teaches belong to the alphabet too: Spanish and JSON calls are rare in the corpus.
    turns = [
        message["content"]
        for row in rows(validate / "instructions.jsonl")
        if row["split"] == "train"
        for message in row["messages"]
    ]
    tokenizer = train_bpe(documents["train"] + turns, cfg.vocab_size, cfg.min_frequency)
    tokenizer.save(str(out / "tokenizer.json"))
    log({"progress": 0.6}, 0)

    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        shard = pack(tokenizer, documents[split])
        shard.tofile(out / f"{split}.bin")
        size = sum(len(text.encode()) for text in documents[split])
        counts[split] = {"tokens": len(shard), "bytes": size, "documents": len(documents[split])}
        if split != "train":
            with (out / f"{split}.txt").open("w", encoding="utf-8", newline="") as f:
                f.write("\n\n".join(documents[split]))
    (out / "tokens.json").write_text(to_json(counts), encoding="utf-8")
    log({"progress": 1.0}, 1)

    heldout = " ".join(documents["test"])
    metrics = {f"{split}.tokens": float(counts[split]["tokens"]) for split in SPLITS}
    metrics["vocab_size"] = float(tokenizer.get_vocab_size())
    metrics["bytes_per_token"] = len(heldout.encode()) / len(encode_text(tokenizer, heldout))
    return metrics
