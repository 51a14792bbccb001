"""Rows as well-known sets publish them, each recognised by itself and placed in the documented schema."""

from typing import Any

import pytest

from components.data.shapes import detect, rows
from components.data.strict import Unfit

OPTIONS = {"text": ["bank", "library"], "label": ["A", "B"]}
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
BAD = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]
# name of the set: its shape, a record, the question, and the right choice among all
CHOICES: dict[str, tuple[str, dict[str, Any], str, str, set[str]]] = {
    "SciQ": (
        "distractors",
        {"question": "Q?", "distractor3": "z", "distractor1": "x", "distractor2": "y", "correct_answer": "a",
         "support": "S."},
        "S.\n\nQ?", "a", {"a", "x", "y", "z"},
    ),
    "SciQ without support": (
        "distractors",
        {"question": "Q?", "distractor3": "z", "distractor1": "x", "distractor2": "y", "correct_answer": "a",
         "support": ""},
        "Q?", "a", {"a", "x", "y", "z"},
    ),
    "GPQA": (
        "distractors",
        {"Question": "Q?", "Correct Answer": "a", "Incorrect Answer 1": "x", "Incorrect Answer 2": "y",
         "Incorrect Answer 3": "z", "Explanation": "E", "Subdomain": "Physics"},
        "Q?", "a", {"a", "x", "y", "z"},
    ),
    "OpenTrivia": (
        "distractors",
        {"category": "Art", "question": "Q?", "correct_answer": "a", "incorrect_answers": ["x", "y"]},
        "Q?", "a", {"a", "x", "y"},
    ),
    "CrowS-Pairs": (
        "crows-pairs",
        {"": "0", "sent_more": "M.", "sent_less": "L.", "stereo_antistereo": "stereo", "bias_type": "age",
         "annotations": "[['age']]", "anon_writer": "a0", "anon_annotators": "['a1']"},
        "age", "L.", {"M.", "L."},
    ),
    "MedMCQA": (
        "mmlu",
        {"id": "e9", "question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2,
         "choice_type": "single", "exp": "E", "subject_name": "Anatomy", "topic_name": None},
        "Q?", "y", {"w", "x", "y", "z"},
    ),
    "BoolQ": ("boolq", {"question": "is it", "answer": True, "passage": "P."}, "P.\n\nis it", "yes", {"yes", "no"}),
    "SuperGLUE BoolQ": (
        "boolq", {"question": "is it", "passage": "P.", "idx": 0, "label": 0}, "P.\n\nis it", "no", {"yes", "no"},
    ),
    "PIQA": ("piqa", {"goal": "G", "sol1": "x", "sol2": "y", "label": 1}, "G", "y", {"x", "y"}),
    "WinoGrande": (
        "winogrande",
        {"sentence": "Sarah beat Maria so _ won.", "option1": "Sarah", "option2": "Maria", "answer": "1"},
        "Sarah beat Maria so ", "Sarah won.", {"Sarah won.", "Maria won."},
    ),
    "OpenBookQA": (
        "arc", {"id": "7", "question_stem": "Q", "choices": OPTIONS, "answerKey": "B"}, "Q", "library",
        {"bank", "library"},
    ),
    "CommonsenseQA": (
        "arc", {"id": "1", "question": "Q?", "question_concept": "c", "choices": OPTIONS, "answerKey": "A"},
        "Q?", "bank", {"bank", "library"},
    ),
    "Social IQA": (
        "mmlu", {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "1"},
        "C.\n\nQ?", "x", {"x", "y", "z"},
    ),
    "CosmosQA": (
        "mmlu",
        {"id": "3", "context": "C.", "question": "Q?", "answer0": "w", "answer1": "x", "answer2": "y", "answer3": "z",
         "label": 1},
        "C.\n\nQ?", "x", {"w", "x", "y", "z"},
    ),
    "LogiQA": (
        "choices", {"context": "C.", "query": "Q?", "options": ["x", "y"], "correct_option": 1}, "C.\n\nQ?", "y",
        {"x", "y"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_questions_with_choices(name: str) -> None:
    shape, record, question, right, choices = CHOICES[name]
    assert detect([record]) == shape
    [(table, row)] = rows(shape, record)
    assert (table, row["question"], set(row["choices"])) == ("eval", question, choices)
    assert row["choices"][row["answer"]] == right and len(row["choices"]) == len(choices)


# name of the set: its shape, a record, and what user and assistant say by turns
SAID: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "SQuAD": (
        "squad",
        {"id": "5", "title": "T", "context": "C", "question": "Q", "answers": {"text": ["A"], "answer_start": [3]}},
        ["Q\n\nC", "A"],
    ),
    "GSM8K": ("pairs", {"question": "Q", "answer": "1 <<1=1>>\n#### 1"}, ["Q", "1 <<1=1>>\n#### 1"]),
    "TriviaQA": ("pairs", {"question": "Q", "answer": {"value": "A", "aliases": ["a"]}}, ["Q", "A"]),
    "Dolly": ("alpaca", {"instruction": "I", "context": "C", "response": "R", "category": "qa"}, ["I\n\nC", "R"]),
    "HelpSteer": (
        "prompt-completion", {"prompt": "P", "response": "R", "helpfulness": 3, "correctness": 4}, ["P", "R"],
    ),
    "OpenOrca": (
        "prompt-completion", {"id": "f", "system_prompt": "S", "question": "Q", "response": "R"}, ["S\n\nQ", "R"],
    ),
    "MATH": ("prompt-completion", {"problem": "P", "solution": "S", "answer": "4", "level": 5}, ["P", "S"]),
    "HumanEval": (
        "prompt-completion", {"task_id": "0", "prompt": "def f():", "canonical_solution": " pass", "test": "t"},
        ["def f():", " pass"],
    ),
    "ShareGPT": (
        "sharegpt", {"id": "i", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        ["Q", "A"],
    ),
    "ShareGPT, items": (
        "sharegpt", {"id": "i", "items": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, ["Q", "A"],
    ),
    "ShareGPT, pairs": (
        "chat", {"conversation": [{"human": "Q", "assistant": "A"}, {"human": "R", "assistant": "B"}]},
        ["Q", "A", "R", "B"],
    ),
    "Capybara": ("chat", {"source": "s", "conversation": [{"input": "Q", "output": "A"}]}, ["Q", "A"]),
    "UltraChat": ("chat", {"id": "0", "data": ["Q", "A", "R", "B"]}, ["Q", "A", "R", "B"]),
    "LIMA": ("chat", {"conversations": ["Q", "A"], "source": "s"}, ["Q", "A"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_questions_and_answers(name: str) -> None:
    shape, record, said = SAID[name]
    assert detect([record]) == shape
    [(table, row)] = rows(shape, record)
    assert table == "instructions"
    assert [m["content"] for m in row["messages"]] == said
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(said) // 2)


COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "UltraFeedback, binarised": (
        "preference-turns",
        {"prompt": "Q", "prompt_id": "x", "chosen": TURNS, "rejected": BAD, "messages": TURNS, "score_chosen": 8.0,
         "score_rejected": 2.0},
    ),
    "ORPO-DPO mix": (
        "preference-turns", {"source": "s", "chosen": TURNS, "rejected": BAD, "prompt": "Q", "question": "Q"},
    ),
    "HelpSteer2 preference": (
        "preference-compared",
        {"split": "train", "prompt": "Q", "response_1": "B", "response_2": "A", "preference_strength": 2,
         "preference_statement": "..."},
    ),
    "PKU-SafeRLHF": (
        "preference-compared", {"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 0},
    ),
    "SHP": (
        "preference-compared", {"post_id": "p", "history": "Q", "human_ref_A": "B", "human_ref_B": "A", "labels": 0},
    ),
    "Arena": (
        "preference-compared",
        {"id": 1, "model_a": "m", "model_b": "n", "prompt": "Q", "response_a": "A", "response_b": "B",
         "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_two_answers(name: str) -> None:
    shape, record = COMPARED[name]
    assert detect([record]) == shape
    [(table, row)] = rows(shape, record)
    assert table == "preferences" and row["messages"] == TURNS[:1]
    assert (row["chosen"]["content"], row["rejected"]["content"]) == ("A", "B")


def test_a_tie_is_no_preference() -> None:
    tie = {"prompt": "Q", "response_1": "A", "response_2": "B", "preference_strength": 0}
    with pytest.raises(Unfit, match="preference: preference_strength 0 prefers neither answer"):
        rows(detect([tie]), tie)


@pytest.mark.parametrize("key", ["items", "data"])
def test_a_list_of_texts_beside_other_fields_is_no_dialogue(key: str) -> None:
    assert detect([{"question": "Q", "answer": "A", key: ["x", "y"]}]) == "pairs"
