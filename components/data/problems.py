"""Generated problems with exact answers: arithmetic, percentages and units, in English and Spanish.

Small sums are answered at once; the others by a call of the calculator. Truths are fractions, so that no answer carries
the rounding of a float. The `object` of a problem is its canonical expression: "7 + 23" and "23 + 7" share a split.
"""

import random
from fractions import Fraction
from typing import Any, NamedTuple

LANGS = ("en", "es")
ASK = {
    "en": ["What is {e}?", "Calculate {e}.", "How much is {e}?", "Work out {e}.", "Compute {e}."],
    "es": ["¿Cuánto es {e}?", "Calcula {e}.", "¿Cuál es el resultado de {e}?", "Halla {e}.", "¿Cuánto da {e}?"],
}
ASK_UNITS = {
    "en": ["How many {to} are {n} {unit}?", "Convert {n} {unit} to {to}.", "What is {n} {unit} in {to}?"],
    "es": ["¿Cuántos {to} son {n} {unit}?", "Convierte {n} {unit} a {to}.", "Pasa {n} {unit} a {to}."],
}
# (symbol, to symbol, operator, factor); the words for people by language
UNITS = [
    ("km", "m", "*", 1000),
    ("m", "cm", "*", 100),
    ("cm", "mm", "*", 10),
    ("kg", "g", "*", 1000),
    ("t", "kg", "*", 1000),
    ("l", "ml", "*", 1000),
    ("h", "min", "*", 60),
    ("min", "s", "*", 60),
    ("days", "h", "*", 24),
    ("weeks", "days", "*", 7),
    ("KiB", "bytes", "*", 1024),
    ("m", "km", "/", 1000),
    ("cm", "m", "/", 100),
    ("g", "kg", "/", 1000),
    ("ml", "l", "/", 1000),
    ("min", "h", "/", 60),
]
WORDS = {
    "en": {"h": "hours", "min": "minutes", "s": "seconds", "l": "litres", "t": "tonnes"},
    "es": {
        "h": "horas",
        "min": "minutos",
        "s": "segundos",
        "l": "litros",
        "t": "toneladas",
        "days": "días",
        "weeks": "semanas",
    },
}
FEMININE = {"horas", "toneladas", "semanas"}
DIRECT_UP_TO = 10


class Problem(NamedTuple):
    """A question with its exact answer. `expression` is for the calculator, `said` for people."""

    object: str
    lang: str
    question: str
    expression: str
    said: str
    result: str
    unit: str  # " m" after the result, or ""
    direct: bool

    @property
    def answer(self) -> str:
        return f"{self.said} = {self.result}{self.unit}."


def number(value: Fraction) -> str:
    """The canonical text of an exact number: "36", "0.5"; no exponent, no trailing zeros.

    Raises ValueError for a number without a finite decimal form, such as 1/3.
    """
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
        if digits > 12:
            raise ValueError(f"{value} has no finite decimal form")
    text = f"{abs(int(value * 10**digits)):0{digits + 1}d}"
    text = f"{text[:-digits]}.{text[-digits:]}" if digits else text
    return f"-{text}" if value < 0 else text


def generate(count: int, seed: int, langs: tuple[str, ...] = LANGS) -> list[Problem]:
    """`count` problems, each on an expression of its own, in the order drawn."""
    rng = random.Random(f"problems/{seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        make = rng.choices([_small, _arithmetic, _two_steps, _percent, _units], [2, 4, 1, 2, 3])[0]
        problem = make(rng, rng.choice(langs))
        if problem is not None:
            found.setdefault(problem.object, problem)
    return list(found.values())


def call(expression: str) -> dict[str, Any]:
    """The assistant's message that asks the calculator."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "calculate", "arguments": {"expression": expression}}],
    }


def dialogue(problem: Problem) -> list[dict[str, Any]]:
    """The whole conversation: question, then the answer, through a call of the calculator unless it is small."""
    question, answer = {"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.answer}
    if problem.direct:
        return [question, answer]
    return [question, call(problem.expression), {"role": "tool", "content": problem.result}, answer]


def _plain(rng: random.Random, lang: str, a: int, operator: str, b: int, direct: bool) -> Problem:
    value = {"+": Fraction(a + b), "-": Fraction(a - b), "*": Fraction(a * b), "/": Fraction(a, b)}[operator]
    expression = f"{a} {operator} {b}"
    low, high = sorted((a, b))
    canonical = f"{low} {operator} {high}" if operator in "+*" else expression
    question = rng.choice(ASK[lang]).format(e=expression)
    return Problem(canonical, lang, question, expression, expression, number(value), "", direct)


def _small(rng: random.Random, lang: str) -> Problem:
    a, b, operator = rng.randint(1, DIRECT_UP_TO), rng.randint(1, DIRECT_UP_TO), rng.choice("+-*")
    return _plain(rng, lang, max(a, b) if operator == "-" else a, operator, min(a, b) if operator == "-" else b, True)


def _arithmetic(rng: random.Random, lang: str) -> Problem:
    operator = rng.choice("+-*/")
    if operator == "*":
        a, b = rng.randint(11, 99), rng.randint(11, 99)
    elif operator == "/":
        b = rng.randint(11, 40)
        a = b * rng.randint(2, 60)
    else:
        a, b = rng.randint(11, 999), rng.randint(11, 999)
    return _plain(rng, lang, a, operator, b, False)


def _two_steps(rng: random.Random, lang: str) -> Problem:
    a, b, c = rng.randint(2, 60), rng.randint(2, 60), rng.randint(2, 20)
    if rng.random() < 0.5:
        expression, value = f"({a} + {b}) * {c}", (a + b) * c
    else:
        expression, value = f"{a} * {c} - {b}", a * c - b
    question = rng.choice(ASK[lang]).format(e=expression)
    return Problem(expression, lang, question, expression, expression, number(Fraction(value)), "", False)


def _percent(rng: random.Random, lang: str) -> Problem:
    percent, whole = rng.choice([*range(5, 100, 5), *range(1, 26)]), rng.randint(2, 200) * 10
    expression = f"{percent}% {'of' if lang == 'en' else 'de'} {whole}"
    question = rng.choice(ASK[lang]).format(e=expression)
    result = number(Fraction(percent * whole, 100))
    return Problem(f"{percent}% of {whole}", lang, question, expression, expression, result, "", False)


def _units(rng: random.Random, lang: str) -> Problem | None:
    unit, to, operator, factor = rng.choice(UNITS)
    value = Fraction(rng.randint(2, 99)) if rng.random() < 0.6 else Fraction(rng.randint(3, 399), 2)
    if operator == "/":
        value = Fraction(rng.randint(2, 400)) * (factor // (20 if factor % 20 == 0 else 4))
    result = value * factor if operator == "*" else value / factor
    words = WORDS[lang]
    unit_word, to_word, n = words.get(unit, unit), words.get(to, to), number(value)
    question = rng.choice(ASK_UNITS[lang]).format(n=n, unit=unit_word, to=to_word)
    if to_word in FEMININE:
        question = question.replace("Cuántos", "Cuántas")
    try:
        answer = number(result)
    except ValueError:
        return None
    if result == 1:
        return None  # "1 hours"
    expression, said = f"{n} {operator} {factor}", f"{n} {unit_word}"
    return Problem(f"{n} {unit} in {to}", lang, question, expression, said, answer, f" {to_word}", False)
