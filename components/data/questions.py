"""Questions about documented objects and generated problems, and what is made of them: instructions, preferences,
prompts and four-choice questions.

A question and everything drawn for it (the wrong answer, the distractors) stay within one split.
"""

import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from components.data import problems
from components.data.sources import Doc, hashed, split_of

Message = dict[str, Any]
KINDS = ("wrong", "cut", "off-topic", "garbled")
SIGNATURE_CHARS = 120
SIMILAR_LENGTH = 24  # distractors are drawn from this many descriptions of nearest length

ASK: dict[str, dict[str, list[str]]] = {
    "describe": {
        "en": ["What does {n} do?", "Describe {n}.", "Explain {n} in one sentence.", "What is {n} for?"],
        "es": ["¿Qué hace {n}?", "Describe brevemente {n}.", "Explica {n} en una frase.", "¿Para qué sirve {n}?"],
    },
    "signature": {
        "en": ["What is the signature of {n}?", "How is {n} called?", "Which arguments does {n} take?"],
        "es": ["¿Cuál es la firma de {n}?", "¿Cómo se llama a {n}?", "¿Qué argumentos recibe {n}?"],
    },
    "module": {
        "en": ["Which module defines {n}?", "In which module is {n}?", "Where is {n} defined?"],
        "es": ["¿Qué módulo define {n}?", "¿En qué módulo está {n}?", "¿Dónde se define {n}?"],
    },
}
ANSWER = {
    "describe": {"en": "{n}: {summary}", "es": "{n}: {summary}"},
    "signature": {"en": "The signature is {signature}.", "es": "La firma es {signature}."},
    "module": {"en": "{n} is defined in the module {module}.", "es": "{n} se define en el módulo {module}."},
}
# Every object is described in English; these are the shares, by hash, that get the other questions too.
SHARES = {"describe/es": 0.25, "signature/en": 0.15, "signature/es": 0.1, "module/en": 0.1, "module/es": 0.08}
OPERATORS = "+-*/"
PAIR_CHARS = 120  # question and right answer: what a small model can compare
CALCULATIONS = 0.75  # of the off-topic answers to a question about an object
SPOILT = (1, 3)  # places of a garbled answer
DRAWS = 200  # how often to look for a fit wrong answer before a pair is left out


class Question(NamedTuple):
    """One question with its right answer. `topic` is describe, signature, module or problem."""

    key: str  # unique; the end of every id made from it
    object: str
    lang: str
    topic: str
    about: str  # the name asked about, or the expression
    words: frozenset[str]  # of `about`: two questions that share none are easily told apart
    messages: list[Message]  # the user's turn
    answer: list[Message]  # what follows it: the answer, or call, result and answer
    truth: str | None = None  # by which an answer can be checked

    @property
    def first(self) -> Message:
        """What the assistant says right after the question."""
        return self.answer[0]


class Pool(NamedTuple):
    """Questions of one split and language, from which wrong answers are drawn; and the problems among them."""

    all: list[Question]
    problems: list[Question]

    @classmethod
    def of(cls, asked: list[Question]) -> "Pool":
        return cls(asked, [q for q in asked if q.topic == "problem"])


def of_docs(docs: list[Doc], seed: int) -> list[Question]:
    """The questions about `docs`: a description in English each, the others by the shares above."""
    roots = {doc.name.partition(".")[0] for doc in docs}
    common = roots if len(roots) == 1 else set()  # within one package every name begins alike
    return [q for doc in docs for q in _of_doc(doc, seed, _words(doc.name) - common)]


def _of_doc(doc: Doc, seed: int, words: frozenset[str]) -> Iterator[Question]:
    able = {
        "describe": bool(doc.summary),
        "signature": 0 < len(doc.signature) <= SIGNATURE_CHARS,
        "module": doc.kind != "module" and doc.name.startswith(f"{doc.module}."),
    }
    for kind in ("describe/en", *SHARES):
        topic, lang = kind.split("/")
        drawn = hashed(f"{seed}/{doc.name}/{kind}") / 2**64 < SHARES.get(kind, 1)
        if not (able[topic] and drawn):
            continue
        ask = ASK[topic][lang]
        text = ask[hashed(f"{seed}/{doc.name}/{kind}/phrase") % len(ask)].format(n=doc.name)
        answer = ANSWER[topic][lang].format(n=doc.name, summary=doc.summary, signature=doc.signature, module=doc.module)
        user, assistant = {"role": "user", "content": text}, {"role": "assistant", "content": answer}
        yield Question(f"{doc.name}/{kind}", doc.object, lang, topic, doc.name, words, [user], [assistant])


def of_problems(found: list[problems.Problem]) -> list[Question]:
    """One question a problem."""
    asked = []
    for problem in found:
        user, *answer = problems.dialogue(problem)
        key = f"{problem.object}/{problem.lang}"
        asked.append(
            Question(
                key,
                problem.object,
                problem.lang,
                "problem",
                problem.expression,
                _words(problem.expression),
                [user],
                answer,
                problem.result,
            )
        )
    return asked


def preferences(asked: list[Question], seed: int) -> Iterator[tuple[Question, str, Message]]:
    """(question, kind, rejected answer) for the short questions; kinds take turns within a split.

    Wrong is the answer to another question of the same topic, a wrong number or a wrong call; cut is the right answer
    broken off; off-topic is the answer to a question of another topic, mostly a calculation where none was asked;
    garbled is the right answer, or call, misspelt as a small model misspells: without such pairs a reward model takes
    whatever it has not seen for good, and a policy finds that out.
    """
    for split in ("train", "val", "test"):
        pool = sorted((q for q in asked if split_of(q.object) == split), key=lambda q: hashed(f"{seed}/{q.key}"))
        short = [q for q in pool if len(q.messages[0]["content"]) + len(q.first["content"]) <= PAIR_CHARS]
        pools = {lang: Pool.of([q for q in short if q.lang == lang]) for lang in problems.LANGS}
        for turn, question in enumerate(short):
            rng = random.Random(f"preference/{seed}/{question.key}")
            kind = KINDS[turn % len(KINDS)]
            rejected = _rejected(question, kind, pools[question.lang], rng)
            if rejected is not None and rejected != question.first:
                yield question, kind, rejected


def _rejected(question: Question, kind: str, pool: Pool, rng: random.Random) -> Message | None:
    if kind == "cut":
        return _cut(question.first, rng)
    if kind == "garbled":
        return _garbled(question, pool, rng)
    if kind == "off-topic":
        calculate = question.topic != "problem" and rng.random() < CALCULATIONS
        other = _another(question, pool.problems if calculate else pool.all, rng, same_topic=False)
        return other.first if other else None
    if question.topic == "problem":
        return _wrong_result(question, pool.problems, rng)
    other = _another(question, pool.all, rng, same_topic=True)
    if other is not None and question.topic == "module":
        content = question.first["content"].replace(_module_of(question), _module_of(other))
        return {"role": "assistant", "content": content}
    return other.first if other else None


def _another(question: Question, pool: list[Question], rng: random.Random, same_topic: bool) -> Question | None:
    """A question of the same topic, or of another one, whose subject shares no word with that of `question`."""
    for _ in range(DRAWS if pool else 0):
        other = rng.choice(pool)
        if (other.topic == question.topic) == same_topic and not other.words & question.words:
            return other
    return None


def _module_of(question: Question) -> str:
    """The end of "json.dumps is defined in the module json.": " json."."""
    return " " + question.first["content"].rpartition(" ")[2]


def _cut(message: Message, rng: random.Random) -> Message:
    """The answer or call broken off between a fifth and two thirds of its way; it never ends like a whole one."""
    if message.get("tool_calls"):
        words = message["tool_calls"][0]["arguments"]["expression"].split(" ")
        return problems.call(" ".join(words[: rng.randrange(2, len(words), 2)]))  # after an operator
    text = message["content"]
    return {"role": "assistant", "content": text[: max(1, int(len(text) * rng.uniform(0.2, 0.66)))].rstrip(" .!?")}


def _garbled(question: Question, pool: Pool, rng: random.Random) -> Message:
    """The answer with pieces of other answers in some places, every other time within the name that was asked about; or
    the call with a digit more, less or changed, or with a result where the expression should end."""
    about = question.about
    if question.topic == "problem":
        spelt = f"{about} = {rng.randrange(100)}" if rng.random() < 0.4 else _misspelt(about, rng)
        if question.first.get("tool_calls") or rng.random() < 0.5:
            return problems.call(spelt)
        return {"role": "assistant", "content": f"{about} = {rng.randrange(100)}."}
    text = question.first["content"]
    for _ in range(rng.randint(*SPOILT)):
        named = text.find(about)
        low, high = (named, named + len(about)) if named >= 0 and rng.random() < 0.5 else (0, len(text))
        at, size = rng.randrange(low, high), rng.randint(2, 8)
        other = rng.choice(pool.all).first["content"] or about
        start = rng.randrange(len(other))
        text = text[:at] + other[start : start + size] + text[at + rng.randint(0, size) :]
    return {"role": "assistant", "content": text}


def _misspelt(expression: str, rng: random.Random) -> str:
    """The expression with one digit more, less or changed."""
    at = rng.choice([m.start() for m in re.finditer(r"\d", expression)])
    digit = str(rng.randrange(10))
    return expression[:at] + rng.choice([digit, digit + expression[at], ""]) + expression[at + 1 :]


def _wrong_result(question: Question, pool: list[Question], rng: random.Random) -> Message | None:
    """A wrong number, or a call of the wrong operation or with another problem's numbers."""
    if not question.first.get("tool_calls"):
        said, _, result = question.first["content"].rpartition(" = ")
        wrong = int(result.rstrip(".")) + rng.choice([-10, -3, -2, -1, 1, 2, 3, 10])
        return {"role": "assistant", "content": f"{said} = {wrong}."}
    expression = question.about
    operator = re.search(r" ([-+*/]) ", expression)
    if operator and expression in question.messages[0]["content"] and rng.random() < 0.4:
        swapped = rng.choice([o for o in OPERATORS if o != operator[1]])
        return problems.call(expression.replace(operator[0], f" {swapped} ", 1))
    other = _another(question, pool, rng, same_topic=True)
    return other.first if other else None


def _words(name: str) -> frozenset[str]:
    """The words of a name in lower case: "http.HTTPStatus.is_ok" -> http, httpstatus, is, ok; numbers count."""
    return frozenset(re.findall(r"[a-z]+|[0-9.]+", name.casefold().replace("_", "."))) - {"."}


def choices(docs: list[Doc], seed: int) -> Iterator[tuple[Doc, list[str], int]]:
    """(object, four descriptions, index of its own) for the described objects of val and test.

    The three others are of the same split and of similar length, from elsewhere in the library, and share less than
    half of their words with the right one. Where the right one stands is drawn by hash.
    """
    for split in ("val", "test"):
        told = {d.object: d for d in reversed(docs) if d.summary and split_of(d.object) == split}
        pool = sorted(told.values(), key=lambda d: (len(d.summary), d.name))
        for at, doc in enumerate(pool):
            near = pool[max(0, at - SIMILAR_LENGTH // 2) : at + SIMILAR_LENGTH // 2 + 1]
            far = [d for d in near if d.module != doc.module and _likeness(d.summary, doc.summary) < 0.5]
            if len(far) < 3:
                continue
            rng = random.Random(f"choice/{seed}/{doc.name}")
            four = [d.summary for d in rng.sample(far, 3)]
            answer = hashed(f"{seed}/{doc.name}/answer") % 4
            four.insert(answer, doc.summary)
            if len(set(four)) == 4:
                yield doc, four, answer


def _likeness(a: str, b: str) -> float:
    """The Jaccard index of the two texts' words."""
    left, right = set(re.findall(r"\w+", a.casefold())), set(re.findall(r"\w+", b.casefold()))
    return len(left & right) / max(1, len(left | right))
