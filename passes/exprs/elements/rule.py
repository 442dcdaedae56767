"""What a row of the element table is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ringfx.ir.tiles import Expr, const
from ringfx.passes.axes.call import Call

if TYPE_CHECKING:
    from ringfx.passes.exprs.lift import Lifter

__all__ = ["ElementRule", "Index", "Rules", "rows", "typed"]

Index: TypeAlias = tuple[Expr, ...]
ElementRule: TypeAlias = "Callable[[Lifter, Call, Index], Expr | None]"
"""(lifter, call, index) -> the element of the call's result there; None where there is no form."""
Rules: TypeAlias = Mapping[object, ElementRule]


def rows(rule: ElementRule, *ops: Any) -> dict[object, ElementRule]:
    """One rule for several operators."""
    return dict.fromkeys(ops, rule)


def typed(value: Any, dtype: torch.dtype) -> Expr:
    """A constant as a tensor of this type holds it."""
    if dtype == torch.bool:
        return const(bool(value))
    if not dtype.is_floating_point:
        return const(int(value))
    if dtype == torch.float64:
        wide = float(value)
        narrow = torch.tensor(wide, dtype=torch.float32).item()
        says_its_type = math.isinf(narrow) and not math.isinf(wide)  # as in tiles: finfo.min
        same = narrow == wide or math.isnan(wide)
        return const(wide) if same or says_its_type else ("double", const(wide))
    return const(torch.tensor(value, dtype=dtype).item())
