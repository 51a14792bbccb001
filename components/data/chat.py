"""Conversations as tokens, and back.

Text is cut into tokens with the special tokens switched off: a user who types `<|end|>` gets its characters, never the
mark. The marks are placed here alone, between pieces of text.
"""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer

from components.artifact import ForjaError
from components.data.templates import CALL, END, RESULT, SEPARATOR, Message, Part, Template, spans, split_marks

SPECIAL = [SEPARATOR, END, CALL, RESULT]


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


def encode(tokenizer: Tokenizer, messages: Sequence[Message], template: Template) -> tuple[list[int], list[bool]]:
    """A conversation's tokens, and for each whether the assistant says it (its answers, calls and what ends them)."""
    ids: list[int] = []
    said: list[bool] = []
    for span in spans(tokenizer, messages, template, ask=False):
        piece = encode_parts(tokenizer, span.parts)
        ids += piece
        said += [span.said] * len(piece)
    return ids, said


def encode_parts(tokenizer: Tokenizer, parts: Sequence[Part]) -> list[int]:
    """One text, cut at the marks of the template alone."""
    ids: list[int] = []
    text = ""
    for part in parts:
        for piece in split_marks(tokenizer, part.text) if part.own else [part.text]:
            if isinstance(piece, str):
                text += piece
            else:
                ids += [*encode_text(tokenizer, text), piece]
                text = ""
    return ids + encode_text(tokenizer, text)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], template: Template) -> list[int]:
    """The conversation so far, up to where the assistant begins to speak."""
    asked = spans(tokenizer, messages, template, ask=True)
    return [i for span in asked for i in encode_parts(tokenizer, span.parts)]


def encode_within(
    tokenizer: Tokenizer, messages: Sequence[Message], template: Template, room: int
) -> tuple[list[int], list[bool]] | None:
    """The same as `encode` in at most `room` tokens, cut from the left; None where the last answer does not fit.

    The earliest exchanges go first, whole. Of the last one the beginning of the question goes, and the template's words
    before it stay. What the assistant says is never cut.
    """
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start in starts:
        ids, said = encode(tokenizer, messages[start:], template)
        if len(ids) <= room:
            return ids, said
    if not starts:
        return None
    first = spans(tokenizer, messages[starts[-1] :], template, ask=False)[0].parts
    question = next((i for i, part in enumerate(first) if not part.own), len(first))
    head = encode_parts(tokenizer, first[:question])
    words = len(encode_parts(tokenizer, first[: question + 1]))
    cut = len(head) + len(ids) - room  # the tokens that the head is put in place of
    return (head + ids[cut:], [False] * len(head) + said[cut:]) if cut < words else None


def answer_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What the assistant said, up to its <|end|>, where it has one; a tool call shows as `<|call|>{...}`."""
    end, call = special(tokenizer, END), special(tokenizer, CALL)
    ids = list(ids[: ids.index(end)]) if end in ids else list(ids)
    if call in ids:
        at = ids.index(call)
        return (tokenizer.decode(ids[:at]) + CALL + tokenizer.decode(ids[at + 1 :])).strip()
    return tokenizer.decode(ids).strip()
