"""Each published shape is told by its keys, and becomes the rows worked out here by hand."""

from typing import Any

import pytest

from components.data.shapes import SHAPES, detect, fitted, rows, to_table
from components.data.sources import hashed
from components.data.strict import Unfit


def u(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def call(**arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}


def judged(key: str) -> tuple[str, dict[str, Any]]:
    return "preferences", {"messages": [u("p")], key: a("c"), "kind": "judged"}


def drawn(key: str) -> int:
    """The place, of two, of the right choice that is drawn by hash."""
    return hashed(f"choice/{key}") % 2


TOOL = {"role": "tool", "content": "7"}
CHOICE = {"question": "Which?", "choices": ["a", "b", "c"], "answer": 1}
CASES: list[tuple[str, Any, list[tuple[str, dict[str, Any]]]]] = [
    ("text", "just text", [("corpus", {"text": "just text"})]),
    ("text", {"text": "t", "url": "x", "id": 3}, [("corpus", {"text": "t"})]),
    ("text", {"content": "t"}, [("corpus", {"text": "t"})]),
    (
        "boolq",
        {"passage": "p", "question": "q", "answer": "False"},  # as a CSV has it
        [("eval", {"question": "p\n\nq", "choices": ["no", "yes"], "answer": 0})],
    ),
    (
        "distractors",
        {"question": "q", "correct_answer": "a", "distractor1": "x"},
        [("eval", {"question": "q", "choices": ["x", "a"] if drawn("q") else ["a", "x"], "answer": drawn("q")})],
    ),
    (
        "crows-pairs",
        {"sent_more": "m", "sent_less": "n", "bias_type": "age"},
        [("eval", {"question": "age", "choices": ["m", "n"] if drawn("mn") else ["n", "m"], "answer": drawn("mn")})],
    ),
    (
        "preference-compared",
        {"prompt": "p", "response_a": "y", "response_b": "n", "winner": "model_b"},
        [("preferences", {"messages": [u("p")], "chosen": a("n"), "rejected": a("y"), "kind": "wrong"})],
    ),
    ("alpaca", {"instruction": "i", "input": "", "output": "o"}, [("instructions", {"messages": [u("i"), a("o")]})]),
    (
        "alpaca",
        {"instruction": "i", "input": "n", "output": "o"},
        [("instructions", {"messages": [u("i\n\nn"), a("o")]})],
    ),
    (
        "alpaca",
        {"instruction": "i", "context": "n", "response": "o"},
        [("instructions", {"messages": [u("i\n\nn"), a("o")]})],
    ),
    (
        "alpaca",
        {"instruction": "i", "output": "o", "history": [["q", "p"]], "system": "s"},
        [("instructions", {"messages": [u("s\n\nq"), a("p"), u("i"), a("o")]})],
    ),
    (
        "self-instruct",
        {"instruction": "i", "instances": [{"input": "", "output": "x"}, {"input": "n", "output": "y"}]},
        [("instructions", {"messages": [u("i"), a("x")]}), ("instructions", {"messages": [u("i\n\nn"), a("y")]})],
    ),
    ("prompt-completion", {"prompt": "p", "completion": " c"}, [("instructions", {"messages": [u("p"), a(" c")]})]),
    ("prompt-completion", {"prompt": "p", "response": "c"}, [("instructions", {"messages": [u("p"), a("c")]})]),
    (
        "prompt-completion",
        {"prompt": [u("p")], "completion": [a("c")]},
        [("instructions", {"messages": [u("p"), a("c")]})],
    ),
    (
        "prompt-completion",
        {"context": "1 +", "continuation": " 1"},
        [("instructions", {"messages": [u("1 +"), a(" 1")]})],
    ),
    (
        "prompt-completion",
        {"context": "n", "query": "q", "response": "c"},
        [("instructions", {"messages": [u("q\n\nn"), a("c")]})],
    ),
    (
        "pairs",
        {"question": "q", "context": "n", "answer": "c"},
        [("instructions", {"messages": [u("q\n\nn"), a("c")]})],
    ),
    ("pairs", {"question": "q", "answer": "a #### 1"}, [("instructions", {"messages": [u("q"), a("a #### 1")]})]),
    ("kto", {"instruction": "p", "input": "", "output": "c", "kto_tag": False}, [judged("rejected")]),
    ("kto", {"messages": [u("p"), a("c")], "kto_tag": True}, [judged("chosen")]),
    (
        "preference-turns",
        {"input": {"messages": [u("p")], "tools": []}, "preferred_output": [a("y")], "non_preferred_output": [a("n")]},
        [("preferences", {"messages": [u("p")], "chosen": a("y"), "rejected": a("n"), "kind": "wrong"})],
    ),
    (
        "squad",
        {"question": "q", "context": "c", "answers": {"text": ["x", "y"], "answer_start": [0, 3]}},
        [("instructions", {"messages": [u("q\n\nc"), a("x")]})],
    ),
    (
        "squad",
        {"question": "q", "answers": [{"text": "x", "answer_start": 0}]},
        [("instructions", {"messages": [u("q"), a("x")]})],
    ),
    ("prompt", {"prompt": "p", "source": "s"}, [("prompts", {"messages": [u("p")]})]),
    ("chat", {"messages": [u("p"), a("c")]}, [("instructions", {"messages": [u("p"), a("c")]})]),
    ("chat", {"messages": [u("p")]}, [("prompts", {"messages": [u("p")]})]),
    (
        "chat",
        {"messages": [{"role": "system", "content": "s"}, u("p"), a("c")]},
        [("instructions", {"messages": [u("s\n\np"), a("c")]})],
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}], "system": "s"},
        [("instructions", {"messages": [u("s\n\np"), a("c")]})],
    ),
    (
        "tool-chat",
        {
            "conversations": [
                {"from": "human", "value": "p"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 3}}'},
                {"from": "observation", "value": "7"},
                {"from": "gpt", "value": "c"},
            ],
            "tools": '[{"name": "f"}]',
        },
        [("instructions", {"messages": [u("p"), call(x=3), TOOL, a("c")], "tools": [{"name": "f"}]})],
    ),
    (
        "tool-chat",
        {
            "messages": [
                u("p"),
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 3}'}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "7"},
                a("c"),
            ]
        },
        [("instructions", {"messages": [u("p"), call(x=3), TOOL, a("c")]})],
    ),
    (
        "tool-chat",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "reasoning", "value": "hm"},
                        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 3}}'},
                    ],
                },
                {"role": "function", "content": {"x": 7}},
                a("c"),
            ]
        },
        [
            (
                "instructions",
                {
                    "messages": [
                        u("pq"),
                        {**call(x=3), "reasoning": "hm"},
                        {"role": "tool", "content": '{"x": 7}'},
                        a("c"),
                    ]
                },
            )
        ],
    ),
    (
        "preference-dialogue",
        {
            "chosen": "\n\nHuman: p\n\nAssistant: q\n\nHuman: r\n\nAssistant: yes ",
            "rejected": "\n\nHuman: p\n\nAssistant: q\n\nHuman: r\n\nAssistant:  no",
        },
        [
            (
                "preferences",
                {"messages": [u("p"), a("q"), u("r")], "chosen": a("yes "), "rejected": a(" no"), "kind": "wrong"},
            )
        ],
    ),
    (
        "preference-text",
        {"prompt": "p", "chosen": "y", "rejected": "n"},
        [("preferences", {"messages": [u("p")], "chosen": a("y"), "rejected": a("n"), "kind": "wrong"})],
    ),
    (
        "preference-text",
        {"system": "s", "question": "p", "chosen": "y", "rejected": "n", "kind": "cut"},
        [("preferences", {"messages": [u("s\n\np")], "chosen": a("y"), "rejected": a("n"), "kind": "cut"})],
    ),
    (
        "preference-turns",
        {
            "conversations": [{"from": "human", "value": "p"}],
            "chosen": {"from": "gpt", "value": "y"},
            "rejected": a("n"),
        },
        [("preferences", {"messages": [u("p")], "chosen": a("y"), "rejected": a("n"), "kind": "wrong"})],
    ),
    (
        "preference-turns",
        {"prompt": "p", "chosen": [u("p"), a("y")], "rejected": [u("p"), a("n")], "messages": [u("p"), a("y")]},
        [("preferences", {"messages": [u("p")], "chosen": a("y"), "rejected": a("n"), "kind": "wrong"})],
    ),
    (
        "preference-turns",
        {"prompt": [u("p")], "chosen": [a("y")], "rejected": [a("n")]},
        [("preferences", {"messages": [u("p")], "chosen": a("y"), "rejected": a("n"), "kind": "wrong"})],
    ),
    ("kto", {"prompt": "p", "completion": "c", "label": True}, [judged("chosen")]),
    ("kto", {"prompt": "p", "completion": "c", "label": 0}, [judged("rejected")]),
    ("kto", {"Prompt": "p", "Completion": "c", "Label": "True"}, [judged("chosen")]),
    ("kto", {"messages": [u("p"), a("c")], "label": False}, [judged("rejected")]),
    (
        "arc",
        {
            "question": {"stem": "q", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]},
            "answerKey": "B",
        },
        [("eval", {"question": "q", "choices": ["x", "y"], "answer": 1})],
    ),
    ("pairs", {"Question": "p", " Answer": "c"}, [("instructions", {"messages": [u("p"), a("c")]})]),
    ("choices", {"query": "Which?", "choices": ["a", "b", "c"], "gold": 1}, [("eval", CHOICE)]),
    ("choices", {"question": "Which?", "choices": ["a", "b", "c"], "answer": "B"}, [("eval", CHOICE)]),
    (
        "choices",
        {"question": "Which?", "choices": ["a", "xx", "c"], "answer": "xx"},
        [("eval", CHOICE | {"choices": ["a", "xx", "c"]})],
    ),
    ("mmlu", {"question": "Which?", "choice0": "a", "choice1": "b", "choice2": "c", "answer": "1"}, [("eval", CHOICE)]),
    ("mmlu", {"question": "Which?", "A": "a", "B": "b", "C": "c", "D": "", "answer": "b"}, [("eval", CHOICE)]),
    (
        "arc",
        {"question": "Which?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        [("eval", CHOICE)],
    ),
    ("hellaswag", {"ctx": "Which?", "ctx_a": "W", "endings": ["a", "b", "c"], "label": "1"}, [("eval", CHOICE)]),
    (
        "truthfulqa",
        {"question": "Which?", "mc1_targets": {"choices": ["a", "b", "c"], "labels": [0, 1, 0]}},
        [("eval", CHOICE)],
    ),
    (
        "piqa",
        {"goal": "g", "sol1": "a", "sol2": "b", "label": 1},
        [("eval", {"question": "g", "choices": ["a", "b"], "answer": 1})],
    ),
    (
        "winogrande",
        {"sentence": "Ann beat Eve, so _ won.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        [("eval", {"question": "Ann beat Eve, so ", "choices": ["Ann won.", "Eve won."], "answer": 1})],
    ),
    (
        "choices",
        {"article": "t", "question": "q", "options": ["x", "y"], "answer": "B"},
        [("eval", {"question": "t\n\nq", "choices": ["x", "y"], "answer": 1})],
    ),
    (
        "choices",
        {"question": "q", "options": {"A": "x", "B": "y"}, "answer": "y", "answer_idx": "B"},
        [("eval", {"question": "q", "choices": ["x", "y"], "answer": 1})],
    ),
    (
        "arc",
        {"question_stem": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        [("eval", {"question": "q", "choices": ["x", "y"], "answer": 1})],
    ),
    (
        "winogrande",
        {"context_options": ["so Ann", "so Eve"], "continuation": "won.", "gold": 0},
        [("eval", {"question": "so ", "choices": ["Ann won.", "Eve won."], "answer": 0})],
    ),
]


QUIZ = ("eval", {"question": "q", "choices": ["x", "y"], "answer": 1})
PLAIN: list[tuple[str, Any, list[tuple[str, dict[str, Any]]]]] = [  # by names in Spanish, or in capitals
    ("text", {"título": "t", "Texto": "x", "fecha": "2026"}, [("corpus", {"text": "x"})]),
    (
        "pairs",
        {"Pregunta": "q", "Respuesta": "a", "Puntuación": "3,5"},
        [("instructions", {"messages": [u("q"), a("a")]})],
    ),
    (
        "alpaca",
        {"Instrucción": "i", "entrada": "n", "salida": "o"},
        [("instructions", {"messages": [u("i\n\nn"), a("o")]})],
    ),
    (
        "alpaca",
        {"instruccion": "i", "contexto": "n", "respuesta": "o"},
        [("instructions", {"messages": [u("i\n\nn"), a("o")]})],
    ),
    ("prompt-completion", {"prompt": "p", "respuesta": "c"}, [("instructions", {"messages": [u("p"), a("c")]})]),
    (
        "chat",
        {"mensajes": [{"rol": "usuario", "contenido": "p"}, {"rol": "asistente", "contenido": "c"}]},
        [("instructions", {"messages": [u("p"), a("c")]})],
    ),
    (
        "preference-text",
        {"pregunta": "p", "elegida": "y", "rechazada": "n"},
        [("preferences", {"messages": [u("p")], "chosen": a("y"), "rejected": a("n"), "kind": "wrong"})],
    ),
    (
        "preference-text",
        {"prompt": "p", "chosen_response": "y", "rejected_response": "n"},
        [("preferences", {"messages": [u("p")], "chosen": a("y"), "rejected": a("n"), "kind": "wrong"})],
    ),
    (
        "squad",
        {"Pregunta": "q", "Contexto": "c", "Respuestas": ["x"]},
        [("instructions", {"messages": [u("q\n\nc"), a("x")]})],
    ),
    ("choices", {"enunciado": "q", "opciones": {"A": "x", "B": "y"}, "respuesta": "B"}, [QUIZ]),
    ("choices", {"pregunta": "q", "opciones": ["x", "y"], "respuesta": "y"}, [QUIZ]),
    ("mmlu", {"Pregunta": "q", "A": "x", "B": "y", "Respuesta": "B"}, [QUIZ]),
    ("mmlu", {"Question": "q", "A": "x", "B": "y", "Answer": "B"}, [QUIZ]),
    ("mmlu", {"pregunta": "q", "opción a": "x", "opción b": "y", "correcta": "b"}, [QUIZ]),
]


@pytest.mark.parametrize(("shape", "value", "wanted"), PLAIN)
def test_names_in_spanish_and_in_capitals(shape: str, value: Any, wanted: list[tuple[str, dict[str, Any]]]) -> None:
    assert detect([value]) == shape
    assert rows(shape, value) == wanted


@pytest.mark.parametrize(("shape", "value", "wanted"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_shapes(shape: str, value: Any, wanted: list[tuple[str, dict[str, Any]]]) -> None:
    assert detect([value]) == shape
    assert rows(shape, value) == wanted


def test_every_shape_has_a_case() -> None:
    assert {shape for shape, _, _ in CASES} == SHAPES.keys()


def test_truthfulqa_with_lists_of_answers() -> None:
    value = {"question": "q", "best_answer": "yes", "correct_answers": ["yes"], "incorrect_answers": ["no", "never"]}
    [(table, row)] = rows(detect([value]), value)
    assert (
        table == "eval" and row["choices"][row["answer"]] == "yes" and sorted(row["choices"]) == ["never", "no", "yes"]
    )


def test_truthfulqa_as_csv_has_its_best_answer_where_the_hash_says() -> None:
    value = {"Question": "Q?", "Best Answer": "best", "Correct Answers": "best; x", "Incorrect Answers": "w1; w2;w3; "}
    [(table, row)] = rows(detect([value]), value)
    at = hashed("choice/Q?") % 4
    wanted = ["w1", "w2", "w3"]
    wanted.insert(at, "best")
    assert (table, row) == ("eval", {"question": "Q?", "choices": wanted, "answer": at})


@pytest.mark.parametrize(
    ("shape", "value", "reason"),
    [
        ("alpaca", {"instruction": "i"}, "missing field: output or response or answer"),
        ("alpaca", {"instruction": 3, "output": "o"}, "wrong type: instruction is no text"),
        ("alpaca", [1], "not an object: a row is {...}, this is a list"),
        ("text", {"text": None}, "wrong type: text is no text"),
        ("pairs", {"question": "q", "answer": 3}, "wrong type: answer is no text"),
        ("chat", {"messages": []}, "missing field: messages"),
        (
            "chat",
            {"messages": [{"role": "judge", "content": "x"}]},
            "roles: message 1 is 'judge''s, not a user's, assistant's, tool's or system's",
        ),
        (
            "chat",
            {"messages": [u("p"), {"role": "system", "content": "s"}]},
            "roles: message 2 is the system's, after others have spoken",
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "parts: message 1 holds a image_url, which is no text",
        ),
        (
            "tool-chat",
            {"messages": [{"from": "function_call", "value": "{no json"}]},
            "tool calls: message 1 holds a call that is not JSON",
        ),
        (
            "tool-chat",
            {"messages": [{"from": "function_call", "value": '{"name": 3}'}]},
            "tool calls: message 1 has a call without name or arguments",
        ),
        (
            "preference-dialogue",
            {"chosen": "\n\nHuman: p\n\nAssistant: y", "rejected": "\n\nHuman: q\n\nAssistant: n"},
            "dialogue: chosen and rejected part before their last turn",
        ),
        ("preference-text", {"chosen": "y", "rejected": "n"}, "missing field: prompt, question or messages"),
        (
            "preference-turns",
            {"prompt": "p", "chosen": u("y"), "rejected": a("n")},
            "roles: chosen is one turn of the assistant's",
        ),
        ("squad", {"question": "q", "context": "c", "answers": []}, "answers: none is given"),
        ("kto", {"messages": [u("p")], "label": True}, "roles: a judged dialogue ends with the assistant's answer"),
        ("kto", {"messages": [u("p"), a("c")]}, "label: true or false is needed"),
        ("choices", {"query": "q", "choices": ["a", "b"], "gold": 2}, "answer: 2 points to none of the 2 choices"),
        (
            "choices",
            {"query": "q", "choices": ["a", "b"], "gold": True},
            "answer: True points to none of the 2 choices",
        ),
        ("choices", {"query": "q", "choices": ["a"], "gold": 0}, "choices: a list of texts is needed"),
        ("hellaswag", {"ctx": "q", "endings": 3, "label": "B"}, "choices: a list of texts is needed"),
        (
            "arc",
            {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "E"},
            "answer: 'E' is none of the labels",
        ),
    ],
)
def test_what_does_not_fit_is_named(shape: str, value: Any, reason: str) -> None:
    with pytest.raises(Unfit) as e:
        rows(shape, value)
    assert str(e.value) == reason


def test_most_records_name_the_shape() -> None:
    alpaca = {"instruction": "i", "input": "", "output": "o"}
    assert detect([alpaca, alpaca, {"text": "t"}, 3]) == "alpaca"
    plain, tool = {"messages": [u("p"), a("c")]}, {"messages": [u("p"), call(), TOOL, a("c")]}
    assert detect([plain, plain, tool]) == "tool-chat"
    with pytest.raises(Unfit, match="no known shape: keys premise, hypothesis"):
        detect([{"premise": "x", "hypothesis": "y"}])
    for answered in ({"prompt": "p", "response_a": "x", "winner": "a"}, {"question": "q", "correct_answer": "x"}):
        with pytest.raises(Unfit, match="no known shape: keys"):
            detect([answered])
    with pytest.raises(Unfit, match="no known shape: a list"):
        detect([[1]])


@pytest.mark.parametrize(
    ("shape", "value", "own"),
    [
        ("text", {"instruction": "i", "output": "o"}, "alpaca"),
        ("alpaca", {"messages": [u("p"), a("c")]}, "chat"),
        ("alpaca", {"text": "t"}, "text"),
        ("alpaca", {"instruction": "i", "text": "i and what was answered"}, None),
        ("alpaca", {"instruction": "i", "output": None}, None),
        ("pairs", {"question": "q"}, None),
        ("kto", {"prompt": "p", "completion": "c"}, None),
        ("choices", {"question": "q", "answer": "B"}, None),
        ("alpaca", "a string", None),
    ],
)
def test_a_record_of_another_shape_than_its_file(shape: str, value: Any, own: str | None) -> None:
    if own is not None:
        assert fitted(shape, value) == (own, rows(own, value))
        return
    with pytest.raises(Unfit):
        fitted(shape, value)


@pytest.mark.parametrize(("truth", "kept"), [("42", "42"), (42, "42"), (0.5, "0.5"), (True, None), (None, None)])
def test_a_prompt_keeps_its_truth(truth: Any, kept: str | None) -> None:
    want = {"messages": [u("6 * 7?")]} | ({} if kept is None else {"truth": kept})
    assert rows("prompt", {"prompt": "6 * 7?", "truth": truth}) == [("prompts", want)]
    assert rows("chat", {"messages": [u("6 * 7?")], "truth": truth}) == [("prompts", want)]
    ((_, other),) = rows("alpaca", {"instruction": "6 * 7?", "output": "42", "truth": truth})
    assert "truth" not in other


def test_rows_move_to_another_table_where_their_parts_allow() -> None:
    said, pair = (
        {"messages": [u("p"), a("c")]},
        {"messages": [u("p")], "chosen": a("y"), "rejected": a("n"), "kind": "wrong"},
    )
    assert to_table("instructions", said, "prompts") == ("prompts", {"messages": [u("p")], "truth": "c"})
    assert to_table("preferences", pair, "instructions") == ("instructions", {"messages": [u("p"), a("y")]})
    assert to_table("preferences", pair, "prompts") == ("prompts", {"messages": [u("p")]})
    assert to_table("eval", CHOICE, "prompts") == ("prompts", {"messages": [u("Which?")], "truth": "b"})
    assert to_table("eval", CHOICE, "instructions") == ("instructions", {"messages": [u("Which?"), a("b")]})
    assert to_table("instructions", said, "corpus") == ("corpus", {"text": "p\n\nc"})
    with pytest.raises(Unfit, match="a row of corpus does not hold what prompts needs"):
        to_table("corpus", {"text": "t"}, "prompts")
