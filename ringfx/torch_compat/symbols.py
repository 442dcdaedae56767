"""Sizes that stand for many numbers, in the programs of Dynamo and in those that are compiled.

Each name says what it is needed for and, after "Without", what a release that drops it breaks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

__all__ = ["Condition", "conditions", "evaluated", "hint_of", "symbol_of", "traced_with_symbols"]

Condition = Callable[[Mapping[str, int]], bool]
"""Whether a program holds where its symbols, by their names, are these numbers. Without: the rest
of this file."""


def symbol_of(size: Any) -> str | None:
    """The name of the symbol that a size is; None for numbers, and for what is computed of symbols.

    Without: programs for a range of lengths.
    """
    expr: Any = size.node.expr if isinstance(size, torch.SymInt) else None
    return expr.name if getattr(expr, "is_Symbol", False) else None


def hint_of(size: torch.SymInt) -> int:
    """The number that it had when the program was traced; reading it guards nothing.

    Without: the same.
    """
    return int(size.node.hint)


def evaluated(size: Any, numbers: Mapping[str, int]) -> int:
    """A size where its symbols are these numbers. Without: the same."""
    return int(_at(size.node.expr, numbers)) if isinstance(size, torch.SymInt) else int(size)


def conditions(mode: FakeTensorMode) -> Condition:
    """All that has been asked of the symbols of a mode, until it is called; what speaks of none of
    the numbers that are given (of a float, say) is not considered. Without: the same."""
    env = mode.shape_env

    def hold(numbers: Mapping[str, int]) -> bool:
        asked = [guard.expr for guard in env.guards] if env is not None else []
        about = (x for x in asked if any(symbol.name in numbers for symbol in x.free_symbols))
        return all(str(_at(expr, numbers)) == "True" for expr in about)

    return hold


def _at(expr: Any, numbers: Mapping[str, int]) -> Any:
    """The expression, computed where its symbols are these numbers."""
    return expr.subs({x: numbers[x.name] for x in expr.free_symbols if x.name in numbers})


@contextlib.contextmanager
def traced_with_symbols(
    numbers: Sequence[int],
) -> Iterator[tuple[FakeTensorMode, list[Any]]]:
    """A mode to trace and compile a program in, outside Dynamo's, and a symbol for each number.

    Without: the same.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    given = torch.empty(tuple(numbers), device="meta")
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(numbers))
    symbols = list(mode.from_tensor(given, symbolic_context=context).shape)
    with tracing(TracingContext(mode)):
        yield mode, symbols
