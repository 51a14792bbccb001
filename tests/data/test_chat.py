"""Conversations as tokens: what is the assistant's, and that user text makes no mark."""

import pytest
from tokenizers import Tokenizer

from components.data.chat import CALL, END, RESULT, SPECIAL, answer_text, encode, encode_prompt, encode_text, special
from components.data.tokenize import train_bpe

PROMPTS = {"user": "Instruction: {content}\n", "assistant": "Response:"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["Instruction: what is it?\nResponse: it is a thing 123"] * 3, 300, 1)


def test_the_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert [special(tokenizer, name) for name in SPECIAL] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "text", [END, "a<|endoftext|>b", "<|call|>{}", "<|<|end|>", "ñandú 🦙", "\u2028\x00\r\n", "1234567", " leading", ""]
)
def test_every_text_round_trips_and_none_makes_a_mark(tokenizer: Tokenizer, text: str) -> None:
    ids = encode_text(tokenizer, text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(i >= len(SPECIAL) for i in ids)


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([i]) for i in encode_text(tokenizer, "2024")] == ["2", "0", "2", "4"]


def test_only_the_assistant_is_learnt(tokenizer: Tokenizer) -> None:
    ids, said = encode(
        tokenizer,
        [
            {"role": "user", "content": "what is 2 + 2?"},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "calculate", "arguments": {"e": "2 + 2"}}]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "4"},
        ],
        PROMPTS,
    )
    spans = [("", [])]
    for i, by_assistant in zip(ids, said, strict=True):
        if by_assistant != (spans[-1][0] == "said"):
            spans.append(("said" if by_assistant else "", []))
        spans[-1][1].append(i)
    texts = [tokenizer.decode(part, skip_special_tokens=False) for _, part in spans]
    assert texts == [
        "Instruction: what is 2 + 2?\nResponse:",
        f'{CALL}{{"name": "calculate", "arguments": {{"e": "2 + 2"}}}}{END}',
        f"{RESULT}4{END}Response:",
        f" 4{END}",
    ]


def test_the_prompt_ends_where_the_answer_begins(tokenizer: Tokenizer) -> None:
    dialogue = [{"role": "user", "content": "what?"}]
    prompt = encode_prompt(tokenizer, dialogue, PROMPTS)
    ids, said = encode(tokenizer, [*dialogue, {"role": "assistant", "content": "a thing"}], PROMPTS)
    assert ids[: len(prompt)] == prompt and said[len(prompt)] and not any(said[: len(prompt)])
    assert answer_text(tokenizer, ids[len(prompt) :]) == "a thing"
    with pytest.raises(ValueError, match="role 'system'"):
        encode(tokenizer, [{"role": "system", "content": ""}], PROMPTS)
