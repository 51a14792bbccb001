"""Conversations as tokens, and back.

Text is cut into tokens with the special tokens switched off: a user who types `<|end|>` gets its characters, never the
mark. The marks are placed here alone, between pieces of text.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from components.artifact import ForjaError

SEPARATOR, END, CALL, RESULT = "<|endoftext|>", "<|end|>", "<|call|>", "<|result|>"
SPECIAL = [SEPARATOR, END, CALL, RESULT]

Message = Mapping[str, Any]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of `text`, none of them special whatever the text says."""
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def with_special(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, changed: forja's special tokens stand behind its vocabulary, where it lacks them."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer


def special(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token. Raises ForjaError where the tokenizer is not one of forja's."""
    found = tokenizer.token_to_id(name)
    if found is None:
        raise ForjaError(f"tokenizer.json: it has no token {name}; make one with the tokenize stage")
    return int(found)


def encode(
    tokenizer: Tokenizer, messages: Sequence[Message], prompts: Mapping[str, str]
) -> tuple[list[int], list[bool]]:
    """A conversation's tokens, and for each whether the assistant says it (its answers, calls and their <|end|>).

    `prompts` holds the templates `user` (with {content}) and `assistant` (what stands before its turn).
    """
    ids: list[int] = []
    said: list[bool] = []

    def add(piece: list[int], by_assistant: bool) -> None:
        ids.extend(piece)
        said.extend([by_assistant] * len(piece))

    end = special(tokenizer, END)
    for message in messages:
        if message["role"] == "user":
            add(encode_text(tokenizer, prompts["user"].replace("{content}", message["content"])), False)
        elif message["role"] == "tool":
            add([special(tokenizer, RESULT), *encode_text(tokenizer, message["content"]), end], False)
        elif message["role"] == "assistant":
            add(encode_text(tokenizer, prompts["assistant"]), False)
            add([*_answer(tokenizer, message), end], True)
        else:
            raise ValueError(f"role {message['role']!r} is none of user, assistant, tool")
    return ids, said


def _answer(tokenizer: Tokenizer, message: Message) -> list[int]:
    ids = encode_text(tokenizer, " " + message["content"]) if message["content"] else []
    for call in message.get("tool_calls", ()):
        text = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
        ids += [special(tokenizer, CALL), *encode_text(tokenizer, text)]
    return ids


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], prompts: Mapping[str, str]) -> list[int]:
    """The conversation so far, up to where the assistant begins to speak."""
    return encode(tokenizer, messages, prompts)[0] + encode_text(tokenizer, prompts["assistant"])


def answer_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What the assistant said, up to its <|end|>; a tool call shows as `<|call|>{...}`."""
    end, call = special(tokenizer, END), special(tokenizer, CALL)
    ids = list(ids[: ids.index(end)]) if end in ids else list(ids)
    if call in ids:
        at = ids.index(call)
        return (tokenizer.decode(ids[:at]) + CALL + tokenizer.decode(ids[at + 1 :])).strip()
    return tokenizer.decode(ids).strip()
