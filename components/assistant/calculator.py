"""What an arithmetic expression is worth, exactly. Its text is parsed, never run: numbers, + - * / and parentheses, and
a percentage of something, in English or Spanish: "15% of 240", "15% de 240"."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

LONGEST = 200  # characters, which bound depth and size of what can be asked
PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%\s*(?:of|de)\b", re.ASCII)
NUMBER = re.compile(r"\d+(\.\d+)?", re.ASCII)
OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(expression: str) -> Fraction:
    """Raises ValueError, with the reason, for what is no such expression or has no value."""
    if len(expression) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    text = PERCENT.sub(r"\1 / 100 *", expression).strip()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"not an expression: {expression}") from None
    return _value(tree.body, text)


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left, text), _value(node.right, text)
        if isinstance(node.op, ast.Div) and right == 0:
            raise ValueError("division by zero")
        return OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    said = ast.get_source_segment(text, node) or ""
    if isinstance(node, ast.Constant) and NUMBER.fullmatch(said):
        return Fraction(said)
    raise ValueError(f"neither a number nor + - * /: {said}")
