"""Tokenize: a byte-level BPE learnt from the training rows, and each split's documents as one packed shard.

Bytes are the base alphabet, so every string round-trips. Digits stand alone: numbers are read place by place. A recipe
that goes on from someone else's model names its tokenizer instead, and forja's special tokens are put behind it.

The rows go by in groups, so that a corpus need not fit the memory. A shard is <split>.npy, every document followed by
the separator, and <split>.ends.npy says behind which token each document ends.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import orjson
from numpy.lib import format as npy
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from components.artifact import ForjaError, to_json
from components.data.chat import SEPARATOR, SPECIAL, special, with_special
from components.data.encode import Encoder, encode_all, samples
from components.data.sources import hashed
from components.log import Log

SPLITS = ("train", "val", "test")
GROUP_CHARS = 1 << 20  # of the documents that are encoded together


class Config(BaseModel, frozen=True, extra="forbid"):
    vocab_size: int | None = Field(ge=256 + len(SPECIAL))
    min_frequency: int | None = Field(ge=1)
    sample_mb: int = Field(ge=1)  # learn from so much of a larger corpus: whole rows, chosen by the hash of their place
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
            yield orjson.loads(line)


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int) -> Tokenizer:
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
        tokenizer = with_special(Tokenizer.from_file(str(path)))
    except Exception as e:  # noqa: BLE001  # the library raises nothing narrower
        raise ForjaError(f"{path}: no tokenizers file ({str(e).splitlines()[0]}); fetch it again") from None
    _check_marks(tokenizer, path)
    return tokenizer


def _check_marks(tokenizer: Tokenizer, path: Path) -> None:
    """Raise ForjaError where text makes a special token: a word that is not known, or a mark's own name."""
    marks = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    texts = [*marks.values(), *samples()]
    tokenizer.encode_special_tokens = True
    for text, found in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        if made := marks.keys() & set(found.ids):
            raise ForjaError(
                f"{path}: the text {text[:40]!a} becomes its special token {marks[min(made)]}, so people could forge "
                "it or lose what they wrote; take a tokenizer that spells every text in bytes, such as a byte-level BPE"
            )


class Group(NamedTuple):
    """Documents of one split that stand together in the table, with their languages."""

    split: str
    texts: list[str]
    langs: list[str]


def groups(path: Path) -> Iterator[Group]:
    """The rows of a corpus by split, each in the order of the table."""
    open_: dict[str, Group] = {}
    chars = dict.fromkeys(SPLITS, 0)
    for row in rows(path):
        split = row["split"]
        group = open_.setdefault(split, Group(split, [], []))
        group.texts.append(row["text"])
        group.langs.append(row.get("lang", ""))
        chars[split] += len(row["text"])
        if chars[split] >= GROUP_CHARS:
            yield open_.pop(split)
            chars[split] = 0
    yield from open_.values()


def sample(validate: Path, megabytes: int) -> Iterator[str]:
    """What the BPE learns from: the training rows of the corpus, or about `megabytes` of a larger one, and the turns
    that SFT teaches, which belong to the alphabet too: Spanish and JSON calls are rare in the corpus."""
    path = validate / "corpus.jsonl"
    share = megabytes * 1e6 / max(1, path.stat().st_size)
    for i, row in enumerate(rows(path)):
        if row["split"] == "train" and (share >= 1 or hashed(f"bpe/{i}") < share * 2**64):
            yield row["text"]
    for row in rows(validate / "instructions.jsonl"):
        if row["split"] == "train":
            yield from (message["content"] for message in row["messages"])


class Shard:
    """<split>.npy and <split>.ends.npy, written as they grow, and for held-out splits the text as <split>.txt."""

    def __init__(self, folder: Path, split: str, dtype: type[np.unsignedinteger], files: ExitStack) -> None:
        self.split, self.dtype = split, np.dtype(dtype)
        self.ids = files.enter_context((folder / f"{split}.npy").open("wb"))
        self.ends = files.enter_context((folder / f"{split}.ends.npy").open("wb"))
        self.text: IO[str] | None = None
        if split != "train":
            path = folder / f"{split}.txt"
            self.text = files.enter_context(path.open("w", encoding="utf-8", newline="", buffering=1 << 20))
        self.tokens = self.documents = self.bytes = 0
        self.close()

    def append(self, texts: list[str], ids: np.ndarray, ends: np.ndarray) -> None:
        self.ids.write(ids.astype(self.dtype).tobytes())
        self.ends.write((ends + self.tokens).astype(np.int64).tobytes())
        self.bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        if self.text is not None:
            self.text.write("".join(f"{chr(10) * 2}{text}" for text in texts)[0 if self.documents else 2 :])
        self.tokens += len(ids)
        self.documents += len(texts)

    def close(self) -> None:
        """Say in the headers how much there is. A header has room for any number, so that its length stays."""
        for f, n, dtype in ((self.ids, self.tokens, self.dtype), (self.ends, self.documents, np.dtype(np.int64))):
            f.seek(0)
            npy.write_array_header_1_0(f, {"descr": dtype.str, "fortran_order": False, "shape": (n,)})


def run(cfg: Config, validate: Path, out: Path, log: Log, tokenizer: Path | None = None) -> dict[str, float]:
    """`tokenizer` is where cfg.tokenizer lies, if it names one."""
    # 1. The tokenizer: learnt, or one that is there.
    path = validate / "corpus.jsonl"
    missing = set(SPLITS)
    for row in rows(path):
        missing.discard(row["split"])
        if not missing:
            break
    for split in sorted(missing, key=SPLITS.index):
        raise ForjaError(f"{path}: no row in the {split} split; ingest more documents")
    if cfg.vocab_size is not None and cfg.min_frequency is not None:
        used = train_bpe(sample(validate, cfg.sample_mb), cfg.vocab_size, cfg.min_frequency)
    else:
        assert tokenizer is not None  # noqa: S101
        used = existing(tokenizer)
    used.save(str(out / "tokenizer.json"))
    log({"progress": 0.4}, 0)

    # 2. The shards: each group encoded by whichever core is free, written in the order of the table.
    encoder = Encoder(used, special(used, SEPARATOR))
    dtype = np.uint16 if max(used.get_vocab().values()) < 1 << 16 else np.uint32
    spoken = Spoken()
    with ExitStack() as files:
        shards = {split: Shard(out, split, dtype, files) for split in SPLITS}
        for group, found in encode_all(encoder, groups(path), lambda group: group.texts):
            shards[group.split].append(group.texts, found.ids, found.ends)
            if group.split != "train":
                spoken.add(group.langs, group.texts, found.ends)
        for shard in shards.values():
            shard.close()
    counts = {s: {"tokens": x.tokens, "bytes": x.bytes, "documents": x.documents} for s, x in shards.items()}
    (out / "tokens.json").write_text(to_json(counts), encoding="utf-8")
    log({"progress": 1.0}, 1)

    # 3. What a token is worth, in the held-out documents and turns of each language.
    for row in rows(validate / "instructions.jsonl"):
        if row["split"] != "train":
            texts = [message["content"] for message in row["messages"]]
            spoken.add([row.get("lang", "")] * len(texts), texts, encoder(texts).ends)
    metrics = {f"{split}.tokens": float(counts[split]["tokens"]) for split in SPLITS}
    metrics |= {"vocab_size": float(used.get_vocab_size()), "tiktoken": float(encoder.why is None)}
    test = counts["test"]
    metrics["bytes_per_token"] = test["bytes"] / (test["tokens"] - test["documents"])
    return metrics | spoken.metrics()


class Spoken:
    """Bytes and tokens of texts by their language."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self.tokens: dict[str, int] = {}

    def add(self, langs: list[str], texts: list[str], ends: np.ndarray) -> None:
        lengths = np.diff(ends, prepend=0) - 1
        for lang, text, n in zip(langs, texts, lengths.tolist(), strict=True):
            self.bytes[lang] = self.bytes.get(lang, 0) + len(text.encode())
            self.tokens[lang] = self.tokens.get(lang, 0) + n

    def metrics(self) -> dict[str, float]:
        return {f"bytes_per_token.{x}": self.bytes[x] / n for x, n in sorted(self.tokens.items()) if x and n}
