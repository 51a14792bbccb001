"""Text to token ids several times as fast as `tokenizers` does it, and exactly as it does it.

tiktoken cuts text by a regular expression and merges pairs of bytes by rank. A byte-level BPE whose file says the same
in other words is rebuilt for it here. The two agree on every text where three things hold, which are looked at when an
`Encoder` is made:

- Both cut alike: the pre-tokenizer is one of the forms that `_pattern` knows.
- Each token is made by one merge, and rank is the place of that merge in the list.
- Every token, spelt out, merges back into itself. Then no two neighbours of an unfinished text can make a token by
  another way than the list's, because tokens that stand side by side in a text are also what the two alone become.

Where one does not hold, or a sample comes out otherwise, `tokenizers` itself encodes, and `Encoder.why` says so.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tiktoken
from tokenizers import Tokenizer, models

from components.artifact import ForjaError

# What Rust's is_numeric has and the Unicode of both regular expression libraries lacks.
NUMERIC = r"[\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}]"
GPT2 = r"(?: ?\p{L}+| ?\p{N}+|'(?:[stmd]|re|ve|ll)| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"
# GPT-2's expression on what lies between single digits: a digit ends the text before it.
DIGITS = (
    GPT2.replace(r" ?\p{N}+", NUMERIC)
    .replace(r"\p{L}\p{N}", r"\p{L}" + NUMERIC[1:-1])
    .replace(r"(?!\S)", rf"(?![^\s{NUMERIC[1:-1]}])")
)
# tiktoken looks for special tokens before it cuts, so these characters, which no text is sent with, stand for what is
# to be put between pieces: the end of a text, and from FIRST on the tokenizer's own added tokens.
FIRST, END = 0x10F000, "\U0010ffff"
MARK = re.compile(f"[{chr(FIRST)}-{END}]")
NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 has no use for: some vocabularies lack them
LONG = 100_000  # white characters in a row on which the expression would run out of stack

Group = TypeVar("Group")


class Encoded(NamedTuple):
    """The ids of several texts, each text's followed by the separator, and where each text's end."""

    ids: np.ndarray  # uint32 [n]
    ends: np.ndarray  # int64 [texts]: behind the separator


class _Unlike(Exception):
    """The tokenizer says something that tiktoken has no words for."""


class Encoder:
    """`tokenizer` with its special tokens switched off: no text makes one. `why` is None where tiktoken encodes."""

    def __init__(self, tokenizer: Tokenizer, separator: int) -> None:
        tokenizer.encode_special_tokens = True
        self.tokenizer, self.separator = tokenizer, separator
        self.why: str | None = None
        try:
            self._build(json.loads(tokenizer.to_str()))
            found, wanted = self._fast(samples()), self._slow(samples())
            if not np.array_equal(found.ids, wanted.ids):
                raise _Unlike("tiktoken gives other ids for a sample")
        except _Unlike as e:
            self.why = str(e)

    def _build(self, spec: dict[str, Any]) -> None:
        pattern = _pattern(spec["pre_tokenizer"])
        if spec["normalizer"] not in (None, {"type": "NFC"}):
            raise _Unlike(f"its normalizer is {spec['normalizer']['type']}")
        self.nfc = self.tokenizer.normalizer if spec["normalizer"] else None
        ranks, ids = _ranks(spec["model"])
        added = _added(spec)
        marks = {chr(FIRST + i): len(ids) + i for i in range(len(added))} | {END: len(ids) + len(added)}
        self.ids = np.array([*ids, *added.values(), self.separator], dtype=np.uint32)
        self.marks = dict(zip(added, marks, strict=False))
        longest_first = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
        self.added = re.compile(longest_first) if added else None
        self.allowed = set(marks)
        self.bpe = tiktoken.Encoding("forja", pat_str=pattern, mergeable_ranks=ranks, special_tokens=marks)

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Raises ForjaError for a text that no UTF-8 can hold."""
        try:
            return self._fast(texts) if self.why is None else self._slow(texts)
        except (UnicodeEncodeError, TypeError):  # the two libraries' ways to refuse half of a surrogate pair
            for text in texts:
                if found := re.search("[\ud800-\udfff]", text):
                    raise ForjaError(
                        f"a text holds U+{ord(found[0]):04X} at character {found.start()}, half of a surrogate pair, "
                        f"which UTF-8 cannot hold ({text[:40]!a}); decode its bytes with errors='replace'"
                    ) from None
            raise

    def _fast(self, texts: Sequence[str]) -> Encoded:
        """The texts joined by END, which becomes the separator: one call for many texts."""
        odd = [i for i, text in enumerate(texts) if _odd(text)]
        if odd:
            return self._around(texts, odd)
        if self.nfc is not None:
            texts = [text if text.isascii() else self.nfc.normalize_str(text) for text in texts]
        joined = "".join([part for text in texts for part in (text, END)])
        if self.added is not None:
            joined = self.added.sub(lambda found: self.marks[found[0]], joined)
        found = self.bpe.encode_to_numpy(joined, allowed_special=self.allowed, disallowed_special=())
        ends = np.flatnonzero(found == len(self.ids) - 1) + 1
        return Encoded(self.ids[found], ends)

    def _around(self, texts: Sequence[str], odd: list[int]) -> Encoded:
        """The same where some texts are for `tokenizers`."""
        parts, start = [], 0
        for i in odd:
            parts += [self._fast(texts[start:i]), self._slow(texts[i : i + 1])]
            start = i + 1
        return joined([*parts, self._fast(texts[start:])])

    def _slow(self, texts: Sequence[str]) -> Encoded:
        found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        parts = [np.array([*encoding.ids, self.separator], dtype=np.uint32) for encoding in found]
        return joined([Encoded(part, np.array([len(part)])) for part in parts])


def joined(parts: Sequence[Encoded]) -> Encoded:
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
    empty = Encoded(np.empty(0, np.uint32), np.empty(0, np.int64))
    return Encoded(
        np.concatenate([empty.ids, *(part.ids for part in parts)]), np.concatenate([empty.ends, *ends]).astype(np.int64)
    )


def encode_all(
    encoder: Encoder, groups: Iterable[Group], texts: Callable[[Group], Sequence[str]], threads: int
) -> Iterator[tuple[Group, Encoded]]:
    """Each group with its texts encoded, in order, by threads: tiktoken does not hold Python's lock. A few more groups
    than threads are in memory at once."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Group, Future[Encoded]]] = deque()
        for group in groups:
            waiting.append((group, pool.submit(encoder, texts(group))))
            if len(waiting) > threads + 1:
                first, found = waiting.popleft()
                yield first, found.result()
        for first, found in waiting:
            yield first, found.result()


def _odd(text: str) -> bool:
    """Whether `text` holds one of our marks, or more white characters in a row than the expression can take."""
    if not text.isascii() and MARK.search(text):
        return True
    return len(text) >= LONG and re.search(rf"\s{{{LONG}}}", text) is not None


def _pattern(pre: dict[str, Any] | None) -> str:
    """tiktoken's expression for a pre-tokenizer. Raises _Unlike."""
    parts = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds = [part["type"] for part in parts]
    if not parts or kinds[-1] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        raise _Unlike("its pre-tokenizer does not end in plain bytes")
    by_gpt2 = parts[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_gpt2:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and by_gpt2 and parts[0]["individual_digits"]:
        return DIGITS
    if kinds == ["Split", "ByteLevel"] and not by_gpt2:
        split = parts[0]
        if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            return _easy_first(split["pattern"]["Regex"])
    raise _Unlike(f"its pre-tokenizer is {' + '.join(kinds)}")


def _easy_first(pattern: str) -> str:
    """`a|b|c(?!d)|e` as `(?:a|b)|c(?!d)|e`: the same, but what needs no looking ahead is left to a faster engine."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(pattern):
        c = pattern[at]
        if c == "\\":
            at += 1
        elif c == "[":
            depth += 1000
        elif c == "]":
            depth %= 1000
        elif depth < 1000 and c in "()":
            depth += 1 if c == "(" else -1
        elif c == "|" and not depth:
            parts.append(pattern[start:at])
            start = at + 1
        at += 1
    parts.append(pattern[start:])
    easy = 0
    while easy < len(parts) and not re.search(r"\(\?[=!<>]|[+*?}]\+", parts[easy]):
        easy += 1
    return "|".join([f"(?:{'|'.join(parts[:easy])})", *parts[easy:]] if easy else parts)


@functools.cache
def byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], list[int]]:
    """Each token's rank by its bytes, and its id by its rank. Raises _Unlike."""
    if model["type"] != "BPE" or model.get("dropout"):
        raise _Unlike("its model is no BPE" if model["type"] != "BPE" else "its BPE drops merges at random")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _Unlike("its BPE marks the beginnings or ends of words")
    byte, vocab = byte_of(), model["vocab"]
    if missing := [b for c, b in byte.items() if c not in vocab and b not in NEVER]:
        raise _Unlike(f"it has no token for the byte {missing[0]:#04x}")
    merges = [(left, right) for left, right in (m.split(" ") if isinstance(m, str) else m for m in model["merges"])]
    made = [c for c, _ in sorted(byte.items(), key=lambda item: item[1])]
    for left, right in merges:
        if left + right != made[-1]:
            made.append(left + right)
    if len(set(made)) < len(made):
        raise _Unlike("one token is made by merges far apart")
    _check_merges(vocab, merges, made, whole=bool(model.get("ignore_merges")))
    return {bytes(map(byte.__getitem__, token)): i for i, token in enumerate(made)}, [
        vocab.get(token, 0) for token in made
    ]


def _check_merges(vocab: dict[str, int], merges: list[tuple[str, str]], made: list[str], whole: bool) -> None:
    """Raise _Unlike where pairs might be merged that the list does not name, or a piece that is a token not become it.

    whole: a piece that is a token becomes it whatever the merges say; tiktoken does so always. A list that names every
    way to halve a token (as those made from tiktoken's files do) leaves no pair out.
    """
    known, listed = set(made), set(merges)
    halves = ((t[:i], t[i:]) for t in made for i in range(1, len(t)))
    complete = all(pair in listed for pair in halves if pair[0] in known and pair[1] in known)
    if not complete and 256 + len(merges) > len(made):
        raise _Unlike("one token is made by several merges, and not by all that could")
    if whole and len(made) < sum(all(c in byte_of() for c in token) for token in vocab):
        raise _Unlike("it has tokens that no merge makes")
    if complete and whole:
        return
    bare = Tokenizer(models.BPE(vocab, merges))
    for encoding in bare.encode_batch_fast([t for t in made if t in vocab], add_special_tokens=False):
        if len(encoding.ids) != 1:
            raise _Unlike(f"its token {''.join(encoding.tokens)!r} does not merge back into itself")


def _added(spec: dict[str, Any]) -> dict[str, int]:
    """The added tokens that text does make: those that are not special. Raises _Unlike."""
    plain = [token for token in spec["added_tokens"] if not token["special"]]
    for token in plain:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            raise _Unlike(f"its added token {token['content']!r} takes in what stands around it")
        if spec["normalizer"] and not token["normalized"]:
            raise _Unlike(f"its added token {token['content']!r} is looked for before the text is normalized")
    if len(plain) > ord(END) - FIRST:
        raise _Unlike(f"it has {len(plain)} added tokens")
    return {token["content"]: token["id"] for token in plain}


@functools.cache
def samples() -> list[str]:
    """Texts in which every kind of character stands beside every kind that the expressions tell apart."""
    kinds: dict[str, list[str]] = {}
    for c in map(chr, [*range(0x3000), *range(0x3000, 0x110000, 97)]):
        if unicodedata.category(c) != "Cs" and len(of := kinds.setdefault(unicodedata.category(c), [])) < 12:
            of.append(c)
    each = [c for of in kinds.values() for c in of]
    around = ["", "a", "1", "!", " ", "  ", "\n", "\r\n", "'", "'s", " \t ", "é", "\u2028"]
    words = "It's 3.14 o'clock, we'LL say   'RE; x=1234567;\r\n\r\n\t\tdef f(): return  0x1F\n ¿Qué año? ¡1.000 niños! "
    return [words * 3, *(f"{x}{c}{y}{c}{c}" for c in each for x, y in itertools.pairwise(around)), ""]
