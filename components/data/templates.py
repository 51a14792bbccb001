"""How a conversation is written: by the templates of conf/prompts, or by the chat template that came with a model.

Either way it becomes spans of text, each the assistant's or not, whose parts are the template's or people's. Marks such
as `<|end|>` are tokens in the template's parts alone; what people wrote never makes one.

A template of conf/prompts has `user` and `assistant` (what stands before its turn), and may have `answer` (default
` {content}<|end|>`) and `tool` (default `<|result|>{content}<|end|>`). One that came with a model is `jinja`, with its
`bos_token` and `eos_token`; it is run in Jinja's sandbox.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from components.artifact import ForjaError

SEPARATOR, END, CALL, RESULT = "<|endoftext|>", "<|end|>", "<|call|>", "<|result|>"
ANSWER, TOOL = f" {{content}}{END}", f"{RESULT}{{content}}{END}"
WRITTEN, KEPT = {"user", "assistant", "answer", "tool"}, {"jinja", "bos_token", "eos_token"}
HELD = re.compile("\ue000(\\d+)\ue001")  # where message i's words go in what Jinja wrote

Message = Mapping[str, Any]
Template = Mapping[str, str]


class Part(NamedTuple):
    text: str
    own: bool  # the template's own, where marks are tokens


class Span(NamedTuple):
    """Parts that are tokenized as one text, and whether the assistant says them."""

    parts: list[Part]
    said: bool


def checked(prompts: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The templates of a recipe by language. Raises ValueError for one that cannot be used."""
    for lang, template in prompts.items():
        known = KEPT if "jinja" in template else WRITTEN
        if unknown := sorted(template.keys() - known):
            raise ValueError(f"{lang}.{unknown[0]} is none of {', '.join(sorted(known))}")
        for key in ("user", "assistant") if known is WRITTEN else ():
            if key not in template:
                raise ValueError(f"{lang} lacks {key}")
        for key in template.keys() & {"user", "answer", "tool"}:
            if template[key].count("{content}") != 1:
                raise ValueError(f"{lang}.{key} has to hold {{content}} once")
    return prompts


def template_of(prompts: Mapping[str, Template], row: Mapping[str, Any]) -> Template:
    """The template of the row's language. Raises ForjaError where there is none."""
    if row["lang"] not in prompts:
        raise ForjaError(
            f"row {row['id']} is in {row['lang']!r}, and the recipe's prompts are {sorted(prompts)}; "
            f"add conf/prompts/{row['lang']}.yaml to sft.prompts"
        )
    return prompts[row["lang"]]


def _marks(tokenizer: Tokenizer) -> tuple[dict[str, int], re.Pattern[str]]:
    """{text: id} of the tokenizer's special tokens, and the expression that finds them."""
    return _marks_of(tokenizer, tokenizer.get_vocab_size())


@lru_cache(maxsize=8)
def _marks_of(tokenizer: Tokenizer, size: int) -> tuple[dict[str, int], re.Pattern[str]]:
    found = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    longest = sorted(found, key=len, reverse=True)
    return found, re.compile("|".join(map(re.escape, longest)) or "(?!)")


def split_marks(tokenizer: Tokenizer, text: str) -> Iterator[str | int]:
    """A template's text as the ids of its marks and the texts between them."""
    known, pattern = _marks(tokenizer)
    at = 0
    for mark in pattern.finditer(text):
        if mark.start() > at:
            yield text[at : mark.start()]
        yield known[mark[0]]
        at = mark.end()
    if at < len(text):
        yield text[at:]


def stop(tokenizer: Tokenizer, prompts: Mapping[str, Template]) -> int:
    """The token that ends an answer, in whatever language. Raises ForjaError where there is none, or several are."""
    found = {lang: _stop(tokenizer, template) for lang, template in prompts.items()}
    if len(set(found.values())) != 1:
        said = ", ".join(f"{lang} {tokenizer.id_to_token(i)}" for lang, i in found.items()) or "none"
        raise ForjaError(f"prompts: one token has to end the answers of all templates, and these have {said}")
    return next(iter(found.values()))


def _stop(tokenizer: Tokenizer, template: Template) -> int:
    """The last mark behind an answer."""
    behind = _answered(template)[1] if "jinja" in template else template.get("answer", ANSWER).partition("{content}")[2]
    ids = [piece for piece in split_marks(tokenizer, behind) if isinstance(piece, int)]
    if not ids:
        raise ForjaError(
            f"prompts: behind an answer stands {behind!r}, which holds no special token of tokenizer.json, so nothing "
            "would end it; take a template whose marks the tokenizer has, such as conf/prompts/en.yaml"
        )
    return ids[-1]


def spans(tokenizer: Tokenizer, messages: Sequence[Message], template: Template, ask: bool) -> list[Span]:
    """The conversation; with `ask`, up to where the assistant begins to speak.

    Raises ForjaError where a chat template cannot write it.
    """
    if "jinja" in template:
        return _kept(tokenizer, messages, template, ask)
    found: list[Span] = []
    for message in messages:
        if message["role"] == "assistant":
            found.append(Span([Part(template["assistant"], True)], False))
            found += _answer(tokenizer, message, template.get("answer", ANSWER))
        elif message["role"] in ("user", "tool"):
            text = template["user"] if message["role"] == "user" else template.get("tool", TOOL)
            before, _, behind = text.partition("{content}")
            found.append(Span([Part(before, True), Part(message["content"], False), Part(behind, True)], False))
        else:
            raise ValueError(f"role {message['role']!r} is none of user, assistant, tool")
    return [*found, Span([Part(template["assistant"], True)], False)] if ask else found


def _answer(tokenizer: Tokenizer, message: Message, text: str) -> list[Span]:
    """What the assistant says, calls included, up to the mark that ends it; what stands behind that is not learnt."""
    before, _, behind = text.partition("{content}")
    parts = [Part(before, True), Part(message["content"], False)] if message["content"] else []
    for call in message.get("tool_calls", ()):
        said = json.dumps({"name": call["name"], "arguments": call["arguments"]}, ensure_ascii=False)
        parts += [Part(CALL, True), Part(said, False)]
    end = _end(tokenizer, behind)
    rest = [Span([Part(behind[end:], True)], False)] if behind[end:] else []
    return [Span([*parts, Part(behind[:end], True)], True), *rest]


def _end(tokenizer: Tokenizer, behind: str) -> int:
    """Where the last mark in `behind` ends; its length where there is none."""
    return max((mark.end() for mark in _marks(tokenizer)[1].finditer(behind)), default=len(behind))


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(why: str) -> None:
        raise TemplateError(why)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)


def _render(messages: Sequence[Message], template: Template, ask: bool) -> str:
    """What the chat template writes, with a place in the stead of each message's words."""
    from jinja2 import TemplateError

    places = [{"role": m["role"], "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
    names = {key: template.get(key, "") for key in ("bos_token", "eos_token")}
    try:
        return str(_compiled(template["jinja"]).render(messages=places, add_generation_prompt=ask, **names))
    except (TemplateError, TypeError, ValueError, OverflowError) as e:  # the sandbox's refusals are TemplateErrors
        raise ForjaError(f"chat template: {e}; name a template of conf/prompts instead") from None


def _kept(tokenizer: Tokenizer, messages: Sequence[Message], template: Template, ask: bool) -> list[Span]:
    if any(message.get("tool_calls") for message in messages):
        raise ForjaError("chat template: calls of tools are written by conf/prompts alone; name a template of these")
    text = _render(messages, template, ask)
    found, at = [], 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = _render(messages[:i], template, True), _render(messages[: i + 1], template, False)
            end = len(before) + _end(tokenizer, after[len(before) :])
            if not after.startswith(before) or text[:end] != after[:end]:
                why = f"turn {i + 1} is written otherwise once more turns follow, so what is learnt is not asked"
                raise ForjaError(f"chat template: {why}; name a template of conf/prompts instead")
            found += [Span(_parts(text[at : len(before)], messages), False)]
            found += [Span(_parts(text[len(before) : end], messages), True)]
            at = end
    rest = _parts(text[at:], messages)
    return [*found, Span(rest, False)] if rest else found


def _parts(text: str, messages: Sequence[Message]) -> list[Part]:
    pieces = HELD.split(text)
    said = [messages[int(i)]["content"] for i in pieces[1::2]]
    held = [part for own, words in zip(pieces, said, strict=False) for part in (Part(own, True), Part(words, False))]
    return [part for part in [*held, Part(pieces[-1], True)] if part.text]


def _answered(template: Template) -> tuple[str, str]:
    """What the chat template writes before an answer and behind it."""
    asked = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    before, text = _render(asked[:1], template, True), _render(asked, template, False)
    if not text.startswith(before) or "\ue0001\ue001" not in text[len(before) :]:
        raise ForjaError("chat template: writes no answer behind its question; name a template of conf/prompts instead")
    return before, text[len(before) :].partition("\ue0001\ue001")[2]
