"""The table of operators: its columns agree with each other, and no table forgets an operator."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

import pytest
import torch

from ringfx.ir.tiles import CAUSAL, TILE_OPS, B, Expr, K, Q, children, map_children, walk
from ringfx.ir.tiles.linear_forms import ONE, affine, linear
from ringfx.passes.exprs.ranged import RANGE_RULES
from ringfx.passes.exprs.simplify import NORMAL_FORMS
from ringfx.passes.masks.read_scores import SCORE_RULES

NUMBERS = (-3, -1, 0, 1, 2, 5)
FUNCTIONS = frozenset({
    "exp", "log", "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "softplus",
    "relu", "sin", "cos",
})  # fmt: skip
STEPS = frozenset({"sign", "floor", "ceil", "round", "trunc", "isinf", "isnan"})
BITS = frozenset({"bitand", "bitor", "bitxor"})
COMPARED = frozenset({"le", "lt", "ge", "gt", "eq", "ne"})
LOGIC = frozenset({"and", "or", "xor", "not"})
FLOATS = frozenset({"float", "double", "half", "bfloat16"})
CLAMPS = frozenset({"clamp_min", "clamp_max"})
DIVISIONS = frozenset({"floordiv", "truncdiv", "mod", "fmod"})

TABLES: dict[str, tuple[Collection[str], Collection[str]]] = {
    "fold": (
        [name for name, op in TILE_OPS.items() if op.fold is not None],
        FUNCTIONS | STEPS | BITS | {"truncdiv", "fmod", "pow", "half", "bfloat16"},
    ),
    "bounds": (
        [name for name, op in TILE_OPS.items() if op.bounds is not None],
        FUNCTIONS | STEPS | BITS | FLOATS | {"div", "fmod", "pow"},
    ),
    "pull": (
        [name for name, op in TILE_OPS.items() if op.pull is not None],
        BITS | COMPARED | LOGIC | DIVISIONS | {"isinf", "isnan", "int", "bool"},
    ),
    "infix": (
        [name for name, op in TILE_OPS.items() if op.infix is not None],
        FUNCTIONS | STEPS | BITS | FLOATS
        | {"truncdiv", "fmod", "neg", "abs", "pow", "min", "max", "not", "where", "int", "bool"}
        | CLAMPS,
    ),
    "exprs/simplify.py": (
        NORMAL_FORMS,
        FUNCTIONS | STEPS | BITS | DIVISIONS
        | {"div", "neg", "abs", "pow", "xor", "half", "bfloat16"} | CLAMPS,
    ),
    "exprs/ranged.py": (
        RANGE_RULES,
        FUNCTIONS | STEPS | BITS | COMPARED | LOGIC | FLOATS
        | {"add", "sub", "mul", "div", "fmod", "neg", "pow", "where", "int", "bool"} | CLAMPS,
    ),
    "masks/read_scores.py": (
        SCORE_RULES.keys() - {"kept", "lift"},  # operators of scores only
        (FUNCTIONS - {"tanh"}) | STEPS | BITS | COMPARED | LOGIC | DIVISIONS
        | {"abs", "pow", "int", "bool"},
    ),
}  # fmt: skip
"""Operators that a table or column has a row for, and those for which it is known to need none."""


@pytest.mark.parametrize("table", TABLES)
def test_every_operator_has_a_row_or_is_known_to_need_none(table: str) -> None:
    rows, without = TABLES[table]
    assert set(rows) | set(without) == TILE_OPS.keys()
    assert not set(rows) & set(without)


def tensors(name: str, *operands: torch.Tensor) -> Sequence[torch.Tensor]:
    """Operands as the operator takes them: "where" chooses by a truth value."""
    return (operands[0].bool(), *operands[1:]) if name == "where" else operands


@pytest.mark.parametrize("name", [n for n, op in TILE_OPS.items() if op.fold is not None])
def test_a_folded_constant_is_what_a_tile_computes(name: str) -> None:
    op = TILE_OPS[name]
    assert op.fold is not None
    for operands in itertools.product(NUMBERS, repeat=op.arity):
        if name in ("div", "floordiv", "mod") and operands[1] == 0:
            continue
        on_tile = op.evaluate(*tensors(name, *map(torch.tensor, operands)))
        assert float(op.fold(*operands)) == pytest.approx(float(on_tile))


@pytest.mark.parametrize("name", [n for n, op in TILE_OPS.items() if op.bounds is not None])
def test_values_lie_within_their_bounds(name: str) -> None:
    op = TILE_OPS[name]
    assert op.bounds is not None
    spans = list(itertools.combinations_with_replacement(NUMBERS, 2))[:: max(1, op.arity)]
    for ends in itertools.product(spans, repeat=op.arity):
        low, high = op.bounds(*ends)
        axes = [torch.arange(a, b + 1) for a, b in ends]
        if name in ("floordiv", "truncdiv", "mod"):
            axes[1] = axes[1][axes[1] != 0]
        values = op.evaluate(*tensors(name, *torch.meshgrid(*axes, indexing="ij")))
        assert all(low <= float(x) <= high for x in values.flatten())


def test_a_sign_stands_between_two_operands() -> None:
    assert {op.arity for op in TILE_OPS.values() if op.infix is not None} == {2}


READ: Expr = ("at", 3, B, ("add", Q, ("const", 1)))


def test_only_expressions_are_children() -> None:
    assert children(("const", 3)) == children(Q) == ()
    assert children(READ) == (B, ("add", Q, ("const", 1)))
    assert list(walk(("not", READ))) == [
        ("not", READ), READ, B, ("add", Q, ("const", 1)), Q, ("const", 1)
    ]  # fmt: skip


def test_a_changed_expression_is_put_together_by_make() -> None:
    made: list[str] = []

    def make(head: str, *args: Expr) -> Expr:
        made.append(head)
        return (head, *args)

    def keys(expr: Expr) -> Expr:
        return K if expr == Q else map_children(keys, expr, make)

    assert keys(("and", READ, CAUSAL)) == (
        "and", ("at", 3, B, ("add", K, ("const", 1))), ("le", K, K)
    )  # fmt: skip
    assert made == ["add", "le", "and"]


def test_linear_forms() -> None:
    expr: Expr = ("sub", ("add", ("mul", ("const", 2), Q), READ), ("neg", ("sub", K, ("const", 3))))
    assert linear(expr) == {Q: 2, READ: 1, K: 1, ONE: -3}
    assert affine(expr) is None
    assert affine(("sub", Q, ("add", K, ("const", 3)))) == (1, -1, -3)


@pytest.mark.parametrize("number", [1.0, True, 0.5, float("inf")])
def test_only_integers_are_constants_of_an_affine_form(number: float) -> None:
    """1.0 and True equal 1 in Python."""
    assert affine(("add", Q, ("const", number))) is None
    exact = affine(("add", Q, ("int", ("const", number))), {"add", "int"})
    assert exact == ((1, 0, 1) if number == 1 and number is not True else None)
