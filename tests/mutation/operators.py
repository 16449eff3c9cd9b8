"""Small faults, each put into the text of a module at one place; the rest of it stays as it is."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
COMPARISON = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_PAIRS = (("min", "max"), ("amin", "amax"), ("minimum", "maximum"), ("any", "all"),
          ("add_", "sub_"), ("mul_", "div_"), ("log1p", "log"), ("log1p_", "log_"),
          ("expm1", "exp"), ("exp2", "exp"))  # fmt: skip
NAMES = {a: b for a, b in _PAIRS} | {b: a for a, b in _PAIRS if not b.startswith(("log", "exp"))}
WITHOUT = {"masked_fill", "masked_fill_", "clamp", "nan_to_num", "square", "square_", "neg_"}


class Mutant(NamedTuple):
    line: int
    before: str
    after: str
    source: str  # of the whole module

    def __str__(self) -> str:
        return f"{self.line}: {_short(self.before)} -> {_short(self.after)}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 90 else text[:87] + "..."


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its text."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    text = source.encode()
    found = []
    for node in _code(ast.parse(source)):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        before = text[begin:end].decode()
        for after in _changes(node):
            whole = text[:begin] + after.encode() + text[end:]
            found.append(Mutant(node.lineno, before, after, whole.decode()))
    return sorted(found)


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """What is executed and can be wrong: no docstrings, annotations, decorators, assertions."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Assert | ast.Import):
                continue
            if isinstance(child, ast.ImportFrom | ast.Raise | ast.JoinedStr):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.expr | ast.stmt):
                yield child
            yield from _code(child)


def _changes(node: ast.AST) -> list[str]:
    change = _CHANGES.get(type(node))
    return [] if change is None else [ast.unparse(new) for new in change(node)]


def _copy(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _bracketed(node: ast.AST) -> ast.AST:
    """Put where another expression stood, whose neighbours may bind closer."""
    return ast.Name(id=f"({ast.unparse(node)})")


def _binary(node: ast.BinOp) -> list[ast.AST]:
    other = ARITHMETIC.get(type(node.op))
    return [] if other is None else [_bracketed(_copy(node, op=other()))]


def _assigned(node: ast.AugAssign) -> list[ast.AST]:
    other = ARITHMETIC.get(type(node.op))
    return [ast.Pass()] + ([] if other is None else [_copy(node, op=other())])


def _compared(node: ast.Compare) -> list[ast.AST]:
    other = COMPARISON.get(type(node.ops[0]))
    return [] if other is None else [_bracketed(_copy(node, ops=[other(), *node.ops[1:]]))]


def _boolean(node: ast.BoolOp) -> list[ast.AST]:
    other = ast.Or if isinstance(node.op, ast.And) else ast.And
    return [_bracketed(_copy(node, op=other()))]


def _unary(node: ast.UnaryOp) -> list[ast.AST]:
    return [_bracketed(node.operand)]


def _constant(node: ast.Constant) -> list[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        return [_copy(node, value=not value)]
    if isinstance(value, int):
        return [_bracketed(_copy(node, value=v)) for v in (value + 1, value - 1)]
    if isinstance(value, float):
        return [_bracketed(_copy(node, value=v)) for v in (value + 1.0, value * 2.0) if v != value]
    return []


def _called(node: ast.Call) -> list[ast.AST]:
    """Another function of a pair; `where` with its branches swapped; a correction left out."""
    found: list[ast.AST] = []
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if isinstance(node.func, ast.Name) and node.func.id in NAMES:
        found.append(_copy(node, func=ast.Name(id=NAMES[node.func.id])))
    if name in NAMES:
        found.append(_copy(node, func=_copy(node.func, attr=NAMES[name])))
    if name == "where" and len(node.args) == 3:
        found.append(_copy(node, args=[node.args[0], node.args[2], node.args[1]]))
    if name in WITHOUT:
        found.append(_bracketed(node.func.value))
    return found


def _branched(node: ast.IfExp) -> list[ast.AST]:
    return [_bracketed(_copy(node, body=node.orelse, orelse=node.body))]


def _expression(node: ast.Expr) -> list[ast.AST]:
    """A call for its effect, left out."""
    return [ast.Pass()] if isinstance(node.value, ast.Call) else []


def _reassigned(node: ast.Assign) -> list[ast.AST]:
    """A correction of a variable, left out."""
    read = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
    names = [t.id for t in node.targets if isinstance(t, ast.Name)]
    return [ast.Pass()] if names and read.issuperset(names) else []


_CHANGES: dict[type, Callable[..., list[ast.AST]]] = {
    ast.BinOp: _binary,
    ast.AugAssign: _assigned,
    ast.Compare: _compared,
    ast.BoolOp: _boolean,
    ast.UnaryOp: _unary,
    ast.Constant: _constant,
    ast.Call: _called,
    ast.IfExp: _branched,
    ast.Expr: _expression,
    ast.Assign: _reassigned,
}
