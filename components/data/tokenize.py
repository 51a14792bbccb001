"""Tokenize: a byte-level BPE learnt from the training rows, and each split's documents as one packed shard.

Bytes are the base alphabet, so every string round-trips. Digits stand alone: numbers are read place by place. A recipe
that goes on from someone else's model names its tokenizer instead, and forja's special tokens are put behind it.

The corpus is encoded piece by piece, on this machine by threads, and the pieces are laid one behind the other. The rows
go by in groups, so that a corpus need not fit the memory. A shard is <split>.npy, every document followed by the
separator, and <split>.ends.npy says behind which token each document ends.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
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
from components.data.jsonlines import SIZE, Shard, lines, shards
from components.data.sources import hashed
from components.data.spread import HERE, Executor, cores, each
from components.log import Log

SPLITS = ("train", "val", "test")
PIECES = [f"{split}.{kind}" for split in SPLITS for kind in ("ids", "ends", "txt")]
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


def groups(shard: Shard) -> Iterator[Group]:
    """The rows of a shard of the corpus by split, each in the order of the table."""
    open_: dict[str, Group] = {}
    chars = dict.fromkeys(SPLITS, 0)
    for row in map(orjson.loads, lines(shard)):
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


class Part(NamedTuple):
    """A piece of the corpus, and how it is encoded."""

    shard: Shard
    tokenizer: Path
    dtype: str
    threads: int


class Counted(NamedTuple):
    tokens: int
    bytes: int
    documents: int


@lru_cache(maxsize=1)
def encoder_of(tokenizer: bytes) -> Encoder:
    """An Encoder by what a tokenizer.json says. Remembered: it takes half a second to make."""
    used = Tokenizer.from_buffer(tokenizer)
    return Encoder(used, special(used, SEPARATOR))


def encode(part: Part) -> None:
    """Leave of a piece, by split, <split>.ids and .ends, of a held-out one its text as .txt, and told.json."""
    encoder, folder, spoken = encoder_of(part.tokenizer.read_bytes()), part.shard.work, Spoken()
    shutil.rmtree(folder, ignore_errors=True)  # a cluster may do a piece again
    folder.mkdir(parents=True)
    counts = dict.fromkeys(SPLITS, Counted(0, 0, 0))
    with ExitStack() as files:
        open_ = {x: files.enter_context((folder / x).open("wb", buffering=1 << 20)) for x in PIECES}
        for group, found in encode_all(encoder, groups(part.shard), lambda group: group.texts, part.threads):
            split, n = group.split, counts[group.split]
            texts = [text.encode() for text in group.texts]
            open_[f"{split}.ids"].write(found.ids.astype(part.dtype).tobytes())
            open_[f"{split}.ends"].write((found.ends + n.tokens).astype(np.int64).tobytes())
            counts[split] = Counted(n.tokens + len(found.ids), n.bytes + sum(map(len, texts)), n.documents + len(texts))
            if split != "train":
                open_[f"{split}.txt"].write(b"".join(b"\n\n" + text for text in texts))
                spoken.add(group.langs, texts, found.ends)
    told = {"counts": {split: list(n) for split, n in counts.items()}, "bytes": spoken.bytes, "tokens": spoken.tokens}
    (folder / "told.json").write_bytes(orjson.dumps(told))


class Packed:
    """<split>.npy and <split>.ends.npy, written as they grow, and for held-out splits the text as <split>.txt."""

    def __init__(self, folder: Path, split: str, dtype: str, files: ExitStack) -> None:
        self.split, self.dtype = split, np.dtype(dtype)
        self.ids = files.enter_context((folder / f"{split}.npy").open("wb"))
        self.ends = files.enter_context((folder / f"{split}.ends.npy").open("wb"))
        self.text: IO[bytes] | None = None
        if split != "train":
            self.text = files.enter_context((folder / f"{split}.txt").open("wb"))
        self.counted = Counted(0, 0, 0)
        self.close()

    def append(self, folder: Path, more: Counted) -> None:
        """What `encode` left in a folder."""
        with (folder / f"{self.split}.ids").open("rb") as f:
            shutil.copyfileobj(f, self.ids, 1 << 22)
        ends = np.fromfile(folder / f"{self.split}.ends", np.int64)
        self.ends.write((ends + self.counted.tokens).tobytes())
        if self.text is not None:
            with (folder / f"{self.split}.txt").open("rb") as f:
                f.seek(0 if self.counted.documents else 2)  # what parts documents stands before each
                shutil.copyfileobj(f, self.text, 1 << 22)
        self.counted = Counted(*(a + b for a, b in zip(self.counted, more, strict=True)))

    def close(self) -> None:
        """Say in the headers how much there is. A header has room for any number, so that its length stays."""
        n = self.counted
        for f, many, dtype in ((self.ids, n.tokens, self.dtype), (self.ends, n.documents, np.dtype(np.int64))):
            f.seek(0)
            npy.write_array_header_1_0(f, {"descr": dtype.str, "fortran_order": False, "shape": (many,)})


def run(
    cfg: Config, validate: Path, out: Path, log: Log, tokenizer: Path | None = None, executor: Executor = HERE
) -> dict[str, float]:
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

    # 2. The shards, from pieces in the order of the table.
    many = np.uint16 if max(used.get_vocab().values()) < 1 << 16 else np.uint32
    dtype, work, spoken = np.dtype(many).str, out / ".work", Spoken()
    threads = 1
    if executor.kind == "local":  # threads of this process do as much as processes, in less memory
        threads, executor = executor.workers or cores(), executor.model_copy(update={"workers": 1})
    found = shards([("corpus", path, path.name)], work, SIZE)
    parts = [Part(shard, out / "tokenizer.json", dtype, threads) for shard in found]
    work.mkdir()
    with ExitStack() as files:
        packed = {split: Packed(out, split, dtype, files) for split in SPLITS}
        for i, part in enumerate(each(encode, parts, executor, path.stat().st_size, work), start=1):
            told = orjson.loads((part.shard.work / "told.json").read_bytes())
            for split, counted in told["counts"].items():
                packed[split].append(part.shard.work, Counted(*counted))
            spoken.more(told["bytes"], told["tokens"])
            shutil.rmtree(part.shard.work)
            log({"progress": 0.4 + 0.5 * i / len(parts)}, 1)
        for shard in packed.values():
            shard.close()
    shutil.rmtree(work)
    counts = {split: shard.counted._asdict() for split, shard in packed.items()}
    (out / "tokens.json").write_text(to_json(counts), encoding="utf-8")
    log({"progress": 1.0}, 1)

    # 3. What a token is worth, in the held-out documents and turns of each language.
    encoder = encoder_of((out / "tokenizer.json").read_bytes())
    for row in rows(validate / "instructions.jsonl"):
        if row["split"] != "train":
            texts = [message["content"] for message in row["messages"]]
            spoken.add([row.get("lang", "")] * len(texts), [text.encode() for text in texts], encoder(texts).ends)
    metrics = {f"{split}.tokens": float(counts[split]["tokens"]) for split in SPLITS}
    metrics |= {"vocab_size": float(used.get_vocab_size()), "tiktoken": float(encoder.why is None)}
    test = counts["test"]
    metrics["bytes_per_token"] = test["bytes"] / (test["tokens"] - test["documents"])
    return metrics | spoken.metrics()


class Spoken:
    """Bytes and tokens of texts by their language."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()

    def add(self, langs: list[str], texts: list[bytes], ends: np.ndarray) -> None:
        lengths = np.diff(ends, prepend=0) - 1
        for lang, text, n in zip(langs, texts, lengths.tolist(), strict=True):
            self.bytes[lang] += len(text)
            self.tokens[lang] += n

    def more(self, bytes_: dict[str, int], tokens: dict[str, int]) -> None:
        self.bytes.update(bytes_)
        self.tokens.update(tokens)

    def metrics(self) -> dict[str, float]:
        return {f"bytes_per_token.{x}": self.bytes[x] / n for x, n in sorted(self.tokens.items()) if x and n}
