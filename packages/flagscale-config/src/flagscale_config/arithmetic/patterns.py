"""Layer patterns such as `([0]*3+[1]*58)`, which Megatron evaluates as Python; here nothing is evaluated."""

from __future__ import annotations

import ast

__all__ = ["layer_pattern"]

_MAX = 10_000


def layer_pattern(text: str) -> int | list[int]:
    """Return a number, or the list that an expression of lists, `+` and `*` stands for.

    Raises:
        ValueError: it is something else, or longer than any model.
    """
    found = None
    try:
        if len(text) <= _MAX:
            found = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        found = None
    if found is not None:
        return found
    raise ValueError(f"{text[:60]!r} is neither a number nor a list such as ([0]*3+[1]*58)")


def _value(node: ast.expr) -> int | list[int] | None:
    if isinstance(node, ast.Constant):
        return node.value if type(node.value) is int else None
    if isinstance(node, ast.List):
        items = [_value(child) for child in node.elts]
        whole = [item for item in items if isinstance(item, int)]
        return whole if len(whole) == len(items) else None
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
        return left + right
    if isinstance(node.op, ast.Mult):
        return _repeated(left, right)
    return None


def _repeated(left: int | list[int] | None, right: int | list[int] | None) -> list[int] | None:
    if isinstance(left, int) and isinstance(right, list):
        left, right = right, left
    if isinstance(left, list) and isinstance(right, int) and len(left) * right <= _MAX:
        return left * right
    return None
