"""Dialogues in the forms in which they are published, as forja's messages.

Roles become user, assistant and tool. What a system turn says stands before the first user's words, two line ends
between; reasoning and tool definitions are kept beside what is said (`reasoning`, `tools`), not in it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from components.data.strict import Unfit

Message = dict[str, Any]
Rows = list[tuple[str, dict[str, Any]]]

CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "items", "data")
LOOSE = ("items", "data")
PAIRS = (("human", "assistant"), ("user", "assistant"), ("input", "output"), ("question", "answer"))
QUESTION = ("prompt", "question", "instruction")
ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "usuario"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "bard", "bing", "asistente"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "herramienta"), "tool"),
    **dict.fromkeys(("system", "developer", "sistema"), "system"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
SAID = re.compile(r"\n\n(Human|Assistant):")  # hh-rlhf, Bai et al. 2022


def chat(found: Sequence[Any]) -> str | None:
    """The name of a list of turns: tool-chat, sharegpt or chat; None where it holds no turns."""
    if not found or _in_turn(found):
        return "chat" if found else None
    if not all(isinstance(turn, dict) for turn in found):
        return None
    if not any("role" in turn or "from" in turn for turn in found):
        return None
    if any(_uses_tool(turn) for turn in found):
        return "tool-chat"
    return "sharegpt" if "from" in found[0] else "chat"


def _in_turn(found: Sequence[Any]) -> list[Message] | None:
    """Turns that name no speaker: texts by turns the user's and the assistant's, or objects of a question and its
    answer."""
    if all(isinstance(turn, str) for turn in found):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(found)]
    for asked, answer in PAIRS:
        if all(isinstance(turn, dict) and asked in turn and answer in turn and "role" not in turn for turn in found):
            roles = ((asked, "user"), (answer, "assistant"))
            return [{"role": role, "content": turn[key]} for turn in found for key, role in roles]
    return None


def _uses_tool(turn: Mapping[str, Any]) -> bool:
    parts = turn.get("content")
    return (
        ROLES.get(str(turn.get("role", turn.get("from")))) in ("tool", "call")
        or bool(turn.get("tool_calls") or turn.get("function_call"))
        or (isinstance(parts, list) and any(isinstance(p, dict) and p.get("type") == "tool_call" for p in parts))
    )


def preference(value: Mapping[str, Any]) -> str | None:
    """The name of a record with `chosen` and `rejected`."""
    chosen = value["chosen"]
    if isinstance(chosen, str):
        return "preference-dialogue" if SAID.match(chosen) else "preference-text"
    return "preference-turns" if isinstance(chosen, dict | list) else None


def turns(found: Any) -> list[Message]:
    """Turns of any form as messages, the system's words with the first user's. Raises Unfit."""
    if not isinstance(found, list) or not found:
        raise Unfit("missing field: messages")
    messages: list[Message] = []
    system: list[str] = []
    for at, turn in enumerate(_in_turn(found) or found, start=1):
        message = _turn(turn, at)
        if message["role"] != "system":
            messages.append(message)
        elif messages:
            raise Unfit(f"roles: message {at} is the system's, after others have spoken")
        else:
            system.append(message["content"])
    return with_system("\n\n".join(s for s in system if s.strip()), messages)


def with_system(system: Any, messages: list[Message]) -> list[Message]:
    """The messages with the system's words before the first user's."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise Unfit("wrong type: system is no text")
    if not messages or messages[0]["role"] != "user":
        raise Unfit("roles: after the system the user speaks")
    first = messages[0]
    return [{**first, "content": f"{system}\n\n{first['content']}"}, *messages[1:]]


def history(found: Any) -> list[Message]:
    """Earlier turns as pairs of question and answer."""
    messages: list[Message] = []
    for pair in found or ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise Unfit("history: pairs of a question and an answer are needed")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _turn(turn: Any, at: int) -> Message:
    if not isinstance(turn, dict):
        raise Unfit(f"wrong type: message {at} is no object")
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        raise Unfit(f"roles: message {at} is {said!r}'s, not a user's, assistant's, tool's or system's")
    content = turn["content"] if "content" in turn else turn.get("value")
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, at)}
    message: Message = {"role": role, "content": content}
    if isinstance(content, list):
        message |= _parts(content, at)
    elif content is None:
        message["content"] = ""
    elif not isinstance(content, str):
        if role != "tool":
            raise Unfit(f"wrong type: message {at} has no content text")
        message["content"] = json.dumps(content, ensure_ascii=False)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if calls:
        message["tool_calls"] = _calls(calls, at)
    if isinstance(turn.get("reasoning", turn.get("reasoning_content")), str):
        message["reasoning"] = turn.get("reasoning", turn.get("reasoning_content"))
    return message


def _parts(parts: list[Any], at: int) -> Message:
    """Content given in parts: texts are joined as they are, calls and reasoning have fields of their own."""
    texts: list[str] = []
    reasons: list[str] = []
    calls: list[Message] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        said = (part.get("text") if "text" in part else part.get("value")) if isinstance(part, dict) else part
        if kind == "tool_call":
            calls += _calls(said, at)
        elif isinstance(said, str) and kind in (None, "text", "input_text", "output_text", "reasoning"):
            (reasons if kind == "reasoning" else texts).append(said)
        else:
            raise Unfit(f"parts: message {at} holds a {kind or type(part).__name__}, which is no text")
    found: Message = {"content": "".join(texts)}
    return found | ({"tool_calls": calls} if calls else {}) | ({"reasoning": "".join(reasons)} if reasons else {})


def _calls(found: Any, at: int) -> list[Message]:
    """Calls of any form as [{"name", "arguments"}]: JSON in text, one or several, OpenAI's or bare."""
    found = _from_json(found, at)
    calls = []
    for held in found if isinstance(found, list) else [found]:
        call = held.get("function", held) if isinstance(held, dict) else None
        arguments = _from_json(call.get("arguments", call.get("parameters")), at) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            raise Unfit(f"tool calls: message {at} has a call without name or arguments")
        calls.append({"name": call["name"], "arguments": arguments})
    return calls


def _from_json(found: Any, at: int) -> Any:
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found)
    except (ValueError, RecursionError):
        raise Unfit(f"tool calls: message {at} holds a call that is not JSON") from None


def _chat_of(value: Mapping[str, Any]) -> list[Message]:
    return turns(next((value[key] for key in CHATS if key in value), None))


def rows(value: Any) -> Rows:
    """A chat: an instruction where the assistant has the last word, else a prompt."""
    if not isinstance(value, dict):
        raise Unfit(f"not an object: a row is {{...}}, this is a {type(value).__name__}")
    messages = with_system(value.get("system"), _chat_of(value))
    if not messages:
        raise Unfit("roles: nobody but the system speaks")
    tools = value.get("tools") or value.get("functions")
    fields = {"messages": messages} | ({"tools": _tools(tools)} if tools and tools != "[]" else {})
    return [("instructions" if messages[-1]["role"] == "assistant" else "prompts", fields)]


def _tools(found: Any) -> Any:
    """Tool definitions, kept as they are given; JSON in text is read where it is sound."""
    if not isinstance(found, str):
        return found
    try:
        return json.loads(found)
    except (ValueError, RecursionError):
        return found


def kto(value: Any) -> Rows:
    """An answer judged by itself (Ethayarajh et al. 2024): a preference with `chosen` alone, or `rejected` alone."""
    value = value if isinstance(value, dict) else {}
    good = judgement(value.get("kto_tag", value.get("label")))
    if good is None:
        raise Unfit("label: true or false is needed")
    if key := next((key for key in ("completion", "output", "response") if key in value), None):
        before, answer = _question(value), _one_answer(value[key], key)
        messages = [*before, answer]
    else:
        messages = with_system(value.get("system"), _chat_of(value))
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise Unfit("roles: a judged dialogue ends with the assistant's answer")
    key = "chosen" if good else "rejected"
    return [("preferences", {"messages": messages[:-1], key: messages[-1], "kind": "judged"})]


def judgement(label: Any) -> bool | None:
    """What a label says: true, 1 or "True", as a CSV has it, or their opposites; None where it is no judgement."""
    if isinstance(label, bool | int) and label in (0, 1):
        return bool(label)
    return (
        {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower())
        if isinstance(label, str)
        else None
    )


def preferences(value: Any) -> Rows:
    """Two answers of which one is better. The dialogue before them is given apart, or stands before both."""
    value = value if isinstance(value, dict) else {}
    if "preferred_output" in value and isinstance(value.get("input"), dict):  # OpenAI's
        answers = {"chosen": value["preferred_output"], "rejected": value.get("non_preferred_output")}
        value = {"messages": value["input"].get("messages"), **answers}
    for key in ("chosen", "rejected"):
        if key not in value:
            raise Unfit(f"missing field: {key}")
    chosen, rejected = value["chosen"], value["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and SAID.match(chosen):
        before, better, worse = _parted(_said(chosen), _said(rejected, "rejected"))
    elif isinstance(chosen, list) and isinstance(rejected, list):
        before, better, worse = _after(value, turns(chosen), turns(rejected))
    else:
        before = _question(value)
        better, worse = _one_answer(chosen, "chosen"), _one_answer(rejected, "rejected")
    kind = value["kind"] if isinstance(value.get("kind"), str) else "wrong"
    return [("preferences", {"messages": before, "chosen": better, "rejected": worse, "kind": kind})]


def _said(text: str, which: str = "chosen") -> list[Message]:
    parts = SAID.split(text)
    if parts[0] or len(parts) < 3:
        raise Unfit(f"dialogue: {which} does not begin with Human or Assistant")
    roles = {"Human": "user", "Assistant": "assistant"}
    said = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": roles[who], "content": words.removeprefix(" ")} for who, words in said]


def _parted(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], Message, Message]:
    if chosen[:-1] != rejected[:-1]:
        raise Unfit("dialogue: chosen and rejected part before their last turn")
    return chosen[:-1], chosen[-1], rejected[-1]


def _after(
    value: Mapping[str, Any], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], Message, Message]:
    before, better, worse = _parted(chosen, rejected)
    if not before or before[0]["role"] != "user":  # the answers stand alone: what comes before is given apart
        before = _question(value) + before
    return before, better, worse


def _question(value: Mapping[str, Any]) -> list[Message]:
    """What comes before the answers: a dialogue or a text, with the system's words."""
    for key in (*CHATS, *QUESTION):
        if isinstance(value.get(key), list):
            return with_system(value.get("system"), turns(value[key]))
    for key in QUESTION:
        asked = value.get(key)
        if isinstance(asked, str):
            more = value.get("input")
            asked = f"{asked}\n\n{more}" if isinstance(more, str) and more.strip() else asked
            if SAID.match(asked):
                said = _said(asked)
                messages = said[:-1] if said[-1]["role"] == "assistant" and not said[-1]["content"].strip() else said
            else:
                messages = [{"role": "user", "content": asked}]
            return with_system(value.get("system"), messages)
    raise Unfit("missing field: prompt, question or messages")


def _one_answer(found: Any, which: str) -> Message:
    if isinstance(found, str):
        return {"role": "assistant", "content": found}
    messages = [_turn(found, 1)] if isinstance(found, dict) else turns(found)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise Unfit(f"roles: {which} is one turn of the assistant's")
    return messages[0]
