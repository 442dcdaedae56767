"""Inverses, factors and solutions: each matrix of a batch by itself, all of its rows and columns;
of equations each right-hand side by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ringfx.passes.axes.call import AxisRule, Call, OpAxes
from ringfx.passes.axes.rules.pattern import axes
from ringfx.torch_compat.operators import OpOverload, schema_of

__all__ = ["RULES"]

aten = torch.ops.aten
MATRIX, NUMBERS, NUMBER = 2, 1, 0
"""Dimensions of what a function makes of each matrix."""
REASON = "it is of whole matrices"

_MADE: Mapping[OpOverload, tuple[int, ...]] = {
    aten.linalg_inv.default: (MATRIX,),
    aten.linalg_inv_ex.default: (MATRIX, NUMBER),
    aten.inverse.default: (MATRIX,),
    aten.linalg_pinv.atol_rtol_float: (MATRIX,),
    aten.linalg_pinv.default: (MATRIX,),
    aten.pinverse.default: (MATRIX,),
    aten.linalg_matrix_power.default: (MATRIX,),
    aten.matrix_power.default: (MATRIX,),
    aten.linalg_cholesky.default: (MATRIX,),
    aten.linalg_cholesky_ex.default: (MATRIX, NUMBER),
    aten.cholesky.default: (MATRIX,),
    aten.linalg_qr.default: (MATRIX, MATRIX),
    aten.linalg_svd.default: (MATRIX, NUMBERS, MATRIX),
    aten._linalg_svd.default: (MATRIX, NUMBERS, MATRIX),
    aten.linalg_svdvals.default: (NUMBERS,),
    aten.linalg_eigh.default: (NUMBERS, MATRIX),
    aten._linalg_eigh.default: (NUMBERS, MATRIX),
    aten.linalg_eigvalsh.default: (NUMBERS,),
    aten.linalg_det.default: (NUMBER,),
    aten.det.default: (NUMBER,),
    aten.linalg_slogdet.default: (NUMBER, NUMBER),
    aten.slogdet.default: (NUMBER, NUMBER),
    aten.logdet.default: (NUMBER,),
}


def _of_each(target: OpOverload, made: tuple[int, ...]) -> AxisRule:
    own = [[f"made{i}.{d}" for d in range(dims)] for i, dims in enumerate(made)]
    every = " ".join(["i", "j", *(name for names in own for name in names)])
    given: dict[str, Any] = {schema_of(target).arguments[0].name: "... i j"}
    out = [" ".join(["...", *names]) for names in own]
    return axes(out=out, needs_all=every, reason=REASON, **given)


def _solution(matrix: str, *, of_vectors: bool = False) -> AxisRule:
    """X of A X = B, or of X A = B where ``left`` is False; B may be a vector for each matrix."""

    def rule(call: Call) -> OpAxes:
        a, b = call.shape(matrix), call.shape("B")
        has_vectors = of_vectors and (len(b) == 1 or b == a[:-1])
        one = "... i" if has_vectors else "... i c" if call["left"] else "... c i"
        given: dict[str, Any] = {matrix: "... i j", "B": one}
        return axes(out=one, needs_all="i j", reason=REASON, **given)(call)

    return rule


RULES: dict[OpOverload, AxisRule] = {
    **{target: _of_each(target, made) for target, made in _MADE.items()},
    aten.linalg_solve.default: _solution("A", of_vectors=True),
    aten.linalg_solve_triangular.default: _solution("self"),
    aten.cholesky_solve.default: axes(
        self="... i c", input2="... i j", out="... i c", needs_all="i j", reason=REASON
    ),
}
