"""Situations from the code that a counterexample prints."""

import ast
from typing import Any

from esegeta.conformance import cases, functions, networks, pairs, rebuilding, segmentations
from esegeta.conformance.lawbook import every_law
from esegeta.engine import check

# What the code of a situation consists of: calls of what is known here, and literals.
_LITERAL = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.UnaryOp, ast.USub, ast.Load)


def rebuilt(code: str) -> Any:
    """Return the situation that a counterexample's code stands for. Nothing else is run: no code but such calls.

    >>> rebuilt("Completeness(Case(Linear((1, 2)), [[3, 4]], [[0, 0]], [[[0, 0]]]))").case.score
    Linear((1, 2))
    """
    names: dict[str, Any] = {law.__name__: law for law in every_law()}
    for module in (functions, networks, pairs, rebuilding, segmentations, cases):
        names.update({n: v for n, v in vars(module).items() if isinstance(v, type)})
    try:
        tree = ast.parse(code, mode="eval")
    except SyntaxError as error:
        raise _no_code(str(error)) from None
    for node in ast.walk(tree):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        known = isinstance(node, ast.Name) and node.id in names
        if not (called or known or isinstance(node, (*_LITERAL, ast.Expression, ast.keyword))):
            raise _no_code(repr(ast.unparse(node)))
    return eval(compile(tree, "<situation>", "eval"), {"__builtins__": {}, **names})


def _no_code(got: str) -> ValueError:
    expected = "the code of a situation: calls of laws, cases and scores of esegeta.conformance"
    return check.refused("rebuilt", expected, got, "Copy it from a counterexample")
