"""Encoding by tiktoken against `tokenizers`, on every kind of text; and what is left to `tokenizers`."""

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from components.artifact import ForjaError
from components.data.chat import SPECIAL
from components.data.encode import DIGITS, FIRST, GPT2, LONG, Encoder, _easy_first, encode_all
from components.data.tokenize import train_bpe

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROSE = (
    """It's the year 2024, and they'll say: "we've 1,234.5 things; I'M sure he'd know 'em."
El niño pequeño comió piñas en la montaña, según decía José; ¿qué más? ¡Ninguna canción!
    def f(self, x: int = 0x1F) -> None:\r\n\t\treturn  x ** 2   # the   square\n\n\n
Größe, naïve café, Ελληνικά, русский язык, 中文字符, 日本語の, हिन्दी, ไทย, 🦙🤷🏽‍♀️, e\u0301 n\u0303."""
    * 4
)


def byte_level(pre: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", *SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    return tokenizer


def gpt2() -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    return byte_level(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )


def ours() -> Tokenizer:
    return train_bpe([PROSE], 600, 1)


def composed() -> Tokenizer:
    """With a normalizer, and added tokens that text does make, one the beginning of another."""
    tokenizer = ours()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(["    ", "  ", "|||EMAIL|||", "🦙"])
    return tokenizer


def texts() -> list[str]:
    rng = random.Random(1)

    def drawn(n: int, chars: Callable[[], str]) -> list[str]:
        return ["".join(chars() for _ in range(rng.randrange(50))) for _ in range(n)]

    pieces = ["a", "word", "s", "e", " ", "  ", "    ", "\n", "\r\n", "\t", "'", "'s", "'LL", "1", "23", "é", "ñ", "!"]
    pieces += ["=", "\u2028", "\u0085", "\xa0", "\u200b", "\0", "\x1c", "🦙", "\u0301", "ſ", "K", "²", "Ⅳ", "़", "한"]
    out = drawn(3000, lambda: rng.choice(pieces))
    out += drawn(300, lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])))
    for errors in ("replace", "ignore", "backslashreplace"):
        out += [rng.randbytes(80).decode("utf-8", errors) for _ in range(100)]
    out += [rng.randbytes(80).decode(encoding) for encoding in ("latin-1", "cp437") for _ in range(50)]
    out += [PROSE, "", " ", "\n", *SPECIAL, "x<|end|>y", "|||EMAIL|||", chr(FIRST), "a\U0010ffffb", " 1" * 200]
    out += [" " * (LONG + 7) + "x", "a" * 30_000, "\n" * 2000 + "1"]
    if (DATA / "naughty_strings" / "blns.json").is_file():
        out += json.loads((DATA / "naughty_strings" / "blns.json").read_text(encoding="utf-8"))
    return out


@pytest.mark.parametrize("make", [ours, gpt2, llama3, composed])
def test_the_ids_are_those_of_tokenizers(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    encoder = Encoder(tokenizer, 0)
    assert encoder.why is None
    given = texts()
    ids, ends = encoder(given)
    tokenizer.encode_special_tokens = True
    for text, got in zip(given, np.split(ids, ends[:-1]), strict=True):
        assert got.tolist() == [*tokenizer.encode(text, add_special_tokens=False).ids, 0], ascii(text[:80])


def test_every_text_round_trips_and_none_makes_a_mark() -> None:
    tokenizer = ours()
    given = texts()
    ids, ends = Encoder(tokenizer, 0)(given)
    for text, got in zip(given, np.split(ids, ends[:-1]), strict=True):
        assert tokenizer.decode(got[:-1].tolist(), skip_special_tokens=False) == text
        assert (got[:-1] >= len(SPECIAL)).all()


def test_each_digit_stands_alone_whatever_stands_around_it() -> None:
    """Of every script, and the numerals that are no digits: a text is its parts between them, each by itself."""
    tokenizer = train_bpe([f"{PROSE} 1 22 333 1.234,5 2024-11-25 x86_64 ٣٤ ५६ ½ ² Ⅳ " * 9], 900, 1)
    assert not [t for t in tokenizer.get_vocab() if sum(c.isdigit() for c in t) > 1 and t not in SPECIAL]
    encoder = Encoder(tokenizer, 0)
    assert encoder.why is None
    numerals = [c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "N"]
    rng = random.Random(2)
    for _ in range(400):
        parts = [
            rng.choice([*numerals, "7", "0"]) if rng.random() < 0.7 else rng.choice(["a ", " b", "$", "."])
            for _ in "12345678"
        ]
        pieces: list[str] = []
        for part in parts:  # what stands between two numerals is one text
            if pieces and part not in numerals and pieces[-1] not in numerals:
                pieces[-1] += part
            else:
                pieces.append(part)
        alone = [i for piece in pieces for i in encoder([piece]).ids.tolist()[:-1]]
        assert encoder(["".join(parts)]).ids.tolist()[:-1] == alone, ascii(parts)


@pytest.mark.parametrize("make", [ours, gpt2])
def test_every_character_is_cut_alike(make: Callable[[], Tokenizer]) -> None:
    """Letters, numbers and spaces are those of one Unicode. A token for two characters tells whether they were cut."""
    chars = [c for c in map(chr, range(0x20000)) if unicodedata.category(c) != "Cs"]
    pre = make().pre_tokenizer
    pattern = DIGITS if make is ours else GPT2
    given = [text for c in chars for text in (f"!{c}", f" {c}", f"{c}a", f"1{c}")]
    pieces = [[text[a:b] for _, (a, b) in pre.pre_tokenize_str(text)] for text in given]
    ranks = {bytes([b]): b for b in range(256)}
    for piece in {p.encode() for cut in pieces for p in cut} - set(ranks):
        ranks[piece] = len(ranks)
    whole = tiktoken.Encoding("pieces", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    names = {v: k for k, v in ranks.items()}
    for text, cut in zip(given, pieces, strict=True):
        assert [names[i] for i in whole.encode_ordinary(text)] == [p.encode() for p in cut], ascii(text)


def test_the_sets_at_hand_are_encoded_alike() -> None:
    folder = DATA / "tokenizer_olmo"
    if not folder.is_dir():
        pytest.skip("shared/data/tokenizer_olmo is not there")
    tokenizer = Tokenizer.from_file(str(next(folder.glob("*.json"))))
    encoder = Encoder(tokenizer, 50279)
    assert encoder.why is None  # NFC, added runs of spaces, a vocabulary without the bytes that UTF-8 never has
    given = (DATA / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")[:1500]
    given += [json.loads(line)["answer"] for line in (DATA / "gsm8k" / "test.jsonl").open(encoding="utf-8")][:300]
    given += [Path(__file__).read_text(encoding="utf-8"), *texts()[:500], "e\u0301 \u212b", "     x    \n  y"]
    wanted = tokenizer.encode_batch(given, add_special_tokens=False)
    ids, ends = encoder(given)
    for text, want, got in zip(given, wanted, np.split(ids, ends[:-1]), strict=True):
        assert got.tolist() == [*want.ids, 50279], ascii(text[:80])


def changed(**model: object) -> Tokenizer:
    spec = json.loads(ours().to_str())
    spec["model"] |= model
    return Tokenizer.from_str(json.dumps(spec))


def with_merges(*more: list[str]) -> Tokenizer:
    spec = json.loads(ours().to_str())
    for left, right in more:
        spec["model"]["vocab"].setdefault(left + right, len(spec["model"]["vocab"]))
    spec["model"]["merges"] += more
    return Tokenizer.from_str(json.dumps(spec))


def spaced() -> Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))


def lower() -> Tokenizer:
    tokenizer = ours()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def gaps() -> Tokenizer:
    """A pattern that leaves out what `tokenizers` keeps as a piece of its own."""
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\s+"), "isolated")
    return byte_level(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: changed(dropout=0.1), "drops merges at random"),
        (lambda: with_merges(["Q", "Z"], ["Z", "X"], ["QZ", "X"], ["Q", "ZX"]), "several merges"),
        (lambda: with_merges(["Q", "Z"], ["QZ", "X"], ["Z", "X"], ["Q", "ZX"]), "far apart"),
        (lambda: with_merges(["Z", "X"], ["Q", "Z"], ["QZ", "X"]), "does not merge back into itself"),
        (spaced, "plain bytes"),
        (lower, "normalizer is Lowercase"),
        (gaps, "other ids for a sample"),
    ],
)
def test_what_tiktoken_has_no_words_for_is_left_to_tokenizers(make: Callable[[], Tokenizer], why: str) -> None:
    tokenizer = make()
    encoder = Encoder(tokenizer, 0)
    assert encoder.why is not None and why in encoder.why
    if why != "drops merges at random":
        given = ["QZX QZ ZX", PROSE, "", "<|end|>"]
        wanted = [[*tokenizer.encode(text, add_special_tokens=False).ids, 0] for text in given]
        ids, ends = encoder(given)
        assert [part.tolist() for part in np.split(ids, ends[:-1])] == wanted


def test_half_of_a_surrogate_pair_is_refused_in_words() -> None:
    with pytest.raises(ForjaError, match=r"U\+DC80 at character 3, half of a surrogate pair"):
        Encoder(ours(), 0)(["fine", b"caf\x80".decode("utf-8", "surrogateescape")])


def test_groups_come_back_in_order() -> None:
    encoder = Encoder(ours(), 0)
    groups = [[f"text {i}"] * (50 if i % 3 else 1) for i in range(40)]
    got = list(encode_all(encoder, iter(groups), lambda group: group, 3))
    assert [group for group, _ in got] == groups
    for group, found in got:
        assert found.ids.tolist() == encoder(group).ids.tolist() and len(found.ends) == len(group)


def test_alternatives_without_lookaround_go_first_to_the_faster_engine() -> None:
    assert _easy_first(r"a|[b|(]|(?i:c|d)|\|e|\s+(?!\S)|\s+") == r"(?:a|[b|(]|(?i:c|d)|\|e)|\s+(?!\S)|\s+"
    assert _easy_first(r"a(?=b)|c") == r"a(?=b)|c"
