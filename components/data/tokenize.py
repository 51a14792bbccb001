"""Tokenize: a byte-level BPE learnt from the training rows, and each split's documents as one packed shard.

Bytes are the base alphabet, so every string round-trips. Digits stand alone: numbers are read place by place. A recipe
that goes on from someone else's model names its tokenizer instead, and forja's special tokens are put behind it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from components.artifact import ForjaError, to_json
from components.data.chat import SEPARATOR, SPECIAL, encode_text, special, with_special
from components.log import Log

SPLITS = ("train", "val", "test")


class Config(BaseModel, frozen=True, extra="forbid"):
    vocab_size: int | None = Field(ge=256 + len(SPECIAL))
    min_frequency: int | None = Field(ge=1)
    tokenizer: str | None  # a tokenizer.json, or a folder or hf:org/name that holds one: nothing is learnt then

    @field_validator("tokenizer")
    @classmethod
    def _one_or_the_other(cls, tokenizer: str | None, info: ValidationInfo) -> str | None:
        learnt = [info.data.get(key) is not None for key in ("vocab_size", "min_frequency")]
        if tokenizer is None and not all(learnt):
            raise ValueError("null, so vocab_size and min_frequency must be numbers")
        if tokenizer is not None and any(learnt):
            raise ValueError("wants vocab_size and min_frequency to be null: a tokenizer that is there is not learnt")
        return tokenizer


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


def existing(source: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the folder that holds one, with forja's special tokens behind it."""
    path = source / "tokenizer.json" if source.is_dir() else source
    if not path.is_file():
        raise ForjaError(f"tokenize.tokenizer: {path} is missing; name a tokenizer.json or a folder that holds one")
    try:
        return with_special(Tokenizer.from_file(str(path)))
    except Exception as e:  # noqa: BLE001  # the library raises nothing narrower
        raise ForjaError(f"{path}: no tokenizers file ({str(e).splitlines()[0]}); fetch it again") from None


def pack(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The texts' tokens [n], each document followed by the separator; in uint16 where all of its ids fit, or uint32."""
    tokenizer.encode_special_tokens = True
    separator = special(tokenizer, SEPARATOR)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(separator)
    last = max(tokenizer.get_vocab().values())
    return np.asarray(ids, dtype=np.uint16 if last < 1 << 16 else np.uint32)


def turns(validate: Path) -> list[str]:
    """The turns that SFT teaches, which belong to the alphabet too: Spanish and JSON calls are rare in the corpus."""
    talks = (row["messages"] for row in rows(validate / "instructions.jsonl") if row["split"] == "train")
    return [message["content"] for messages in talks for message in messages]


def run(cfg: Config, validate: Path, out: Path, log: Log, tokenizer: Path | None = None) -> dict[str, float]:
    """`tokenizer` is where cfg.tokenizer lies, if it names one."""
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for row in rows(validate / "corpus.jsonl"):
        documents[row["split"]].append(row["text"])
    for split in SPLITS:
        if not documents[split]:
            raise ForjaError(f"{validate}/corpus.jsonl: no row in the {split} split; ingest more documents")

    if cfg.vocab_size is not None and cfg.min_frequency is not None:
        used = train_bpe(documents["train"] + turns(validate), cfg.vocab_size, cfg.min_frequency)
    else:
        assert tokenizer is not None  # noqa: S101
        used = existing(tokenizer)
    used.save(str(out / "tokenizer.json"))
    log({"progress": 0.6}, 0)

    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        shard = pack(used, documents[split])
        np.save(out / f"{split}.npy", shard)
        size = sum(len(text.encode()) for text in documents[split])
        counts[split] = {"tokens": len(shard), "bytes": size, "documents": len(documents[split])}
        if split != "train":
            with (out / f"{split}.txt").open("w", encoding="utf-8", newline="") as f:
                f.write("\n\n".join(documents[split]))
    (out / "tokens.json").write_text(to_json(counts), encoding="utf-8")
    log({"progress": 1.0}, 1)

    heldout = " ".join(documents["test"])
    metrics = {f"{split}.tokens": float(counts[split]["tokens"]) for split in SPLITS}
    metrics["vocab_size"] = float(used.get_vocab_size())
    metrics["bytes_per_token"] = len(heldout.encode()) / len(encode_text(used, heldout))
    return metrics
