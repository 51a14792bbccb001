"""No text that people write becomes a special token, however it is spelt, wherever it stands and whoever encodes it;
and a tokenizer of which that does not hold is not taken."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from components.artifact import ForjaError
from components.data import tokenize
from components.data.chat import SPECIAL, encode, encode_prompt, encode_text, with_special
from components.data.encode import Encoder
from components.data.templates import CALL, END, RESULT

ROOT = Path(__file__).parents[2]
OLMO = ROOT / ".." / "shared" / "data" / "tokenizer_olmo" / "allenai_gpt-neox-olmo-dolma-v1_5.json"
CHATML = ["<|im_start|>", "<|im_end|>"]
WORDS = "system user assistant im start end of text call result ¿Qué año? <| |> < > | endoftext 1234"


def ours() -> Tokenizer:
    return tokenize.train_bpe([WORDS, *SPECIAL], 420, 1)


def chatml() -> Tokenizer:
    """As Qwen's: marks behind the vocabulary, and the text is composed first."""
    tokenizer = ours()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(CHATML)
    return tokenizer


def folding() -> Tokenizer:
    """One that turns wide signs and capitals into the marks' own letters before it looks for marks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    marks = [AddedToken(name, special=True, normalized=True) for name in (*SPECIAL, *CHATML)]
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=marks, show_progress=False)
    tokenizer.train_from_iterator([WORDS], trainer)
    return tokenizer


def olmo() -> Tokenizer:
    if not OLMO.is_file():
        pytest.skip("shared/data/tokenizer_olmo is not there")
    return tokenize.existing(OLMO)


MAKERS = [ours, chatml, folding, olmo]


def marks_of(tokenizer: Tokenizer) -> dict[int, str]:
    return {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def spelt(mark: str) -> list[str]:
    """A mark as an attacker would try it."""
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in mark)
    hidden = [mark[:at] + c + mark[at:] for at in (1, 2, len(mark) - 1) for c in "\u200b\u200d\u2060\ufeff\u00ad\0"]
    around = [mark * 3, f" {mark} ", f"a{mark}b", f"\n{mark}\n", f"{mark[:4]}{mark}{mark[4:]}", f"{mark}\u0301"]
    return [mark, mark.upper(), wide, json.dumps(mark), mark.encode().decode("utf-16-le", "replace"), *hidden, *around]


@pytest.mark.parametrize("make", MAKERS)
def test_no_spelling_makes_a_mark_by_either_way(make: Any) -> None:
    tokenizer = make()
    marks = marks_of(tokenizer)
    texts = [text for mark in {*marks.values(), *SPECIAL, *CHATML} for text in spelt(mark)]
    for text in texts:
        assert not marks.keys() & set(encode_text(tokenizer, text)), ascii(text)
    separator = tokenizer.token_to_id(SPECIAL[0])
    encoder = Encoder(tokenizer, separator)
    assert (encoder.why is None) == (make is not folding)
    slow = Encoder(tokenizer, separator)
    slow.why = "asked for"
    for found in (encoder(texts), slow(texts)):
        made = [i for i in found.ids.tolist() if i in marks]
        assert made == [separator] * len(texts)
    assert encoder(texts).ids.tolist() == slow(texts).ids.tolist()


@pytest.mark.parametrize("make", [ours, chatml, folding])
@pytest.mark.parametrize("name", ["en", "es", "chatml"])
def test_a_conversation_has_its_templates_marks_and_no_more(make: Any, name: str) -> None:
    """Words in each place that people or tools fill: what is asked, called, given back and answered, and a mark whose
    halves are in two turns."""
    tokenizer = make()
    marks = marks_of(tokenizer)
    if name == "chatml" and not {*CHATML} <= set(marks.values()):
        return
    template = yaml.safe_load((ROOT / "conf" / "prompts" / f"{name}.yaml").read_text(encoding="utf-8"))

    def talk(text: str, first: str, second: str) -> list[dict[str, Any]]:
        call = {"name": text, "arguments": {text: text}}
        return [
            {"role": "user", "content": f"{text}{first}"},
            {"role": "assistant", "content": f"{second}{text}", "tool_calls": [call]},
            {"role": "tool", "content": f"{text}{first}"},
            {"role": "assistant", "content": f"{second}{text}"},
            {"role": "user", "content": f"{text}{{content}}"},
        ]

    def counted(text: str, first: str, second: str) -> Counter[str]:
        messages = talk(text, first, second)
        ids = encode(tokenizer, messages[:-1], template)[0] + encode_prompt(tokenizer, messages, template)
        return Counter(marks[i] for i in ids if i in marks)

    plain = counted("word", "a", "b")
    assert plain[CALL] == 2 and ((plain[END], plain[RESULT]) == (6, 2) or name == "chatml")
    for mark in (*SPECIAL, *CHATML):
        for text in spelt(mark):
            assert counted(text, mark[: len(mark) // 2], mark[len(mark) // 2 :]) == plain, ascii(text)


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]"])
    return tokenizer


def whole_pieces() -> Tokenizer:
    """One in which a piece that is a token becomes it: `ignore_merges`, and nothing that cuts a mark."""
    spec = json.loads(ours().to_str())
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize(("make", "mark"), [(word_level, r"\[UNK\]"), (whole_pieces, r"<\|endoftext\|>")])
def test_a_tokenizer_whose_marks_text_makes_is_not_taken(make: Any, mark: str, tmp_path: Path) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ForjaError, match=rf"tokenizer.json: the text .* becomes its special token {mark}"):
        tokenize.existing(tmp_path)


def test_what_is_taken_makes_none(tmp_path: Path) -> None:
    for make in (ours, chatml, folding):
        make().save(str(tmp_path / "tokenizer.json"))
        taken = tokenize.existing(tmp_path)
        assert marks_of(taken) == marks_of(with_special(make()))
