"""What users give as strategies, checked where it enters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ringfx.errors import InvalidArgument
from ringfx.ir.plan import Plan
from ringfx.strategies import SPLIT_KV, Strategy, planned_with
from ringfx.units.argument import Argument, Code

__all__ = ["checked_strategies", "require_strategies"]

TABLE = 'ringfx.STRATEGIES | {"mine": ringfx.Strategy(name="mine", ...)}'
TAKEN = ("auto", "replicated", "local", SPLIT_KV.name)
"""Words that stand in place of a strategy's name."""
FUNCTIONS = ("forward", "backward", "time", "memory", "admits")


def checked_strategies(given: object) -> Mapping[str, Strategy]:
    """The table, which nobody can change any more.

    Raises
    ------
    InvalidArgument
        It is no mapping from names to strategies of those names.
    """
    if not isinstance(given, Mapping) or not given:
        found = "empty" if isinstance(given, Mapping) else f"a {type(given).__name__}"
        raise InvalidArgument(f"strategies is {found}. Do: give a mapping, {TABLE}.")
    for name, strategy in given.items():
        _check(name, strategy)
    return MappingProxyType(dict(given))


def _check(name: object, strategy: object) -> None:
    if not isinstance(strategy, Strategy):
        raise InvalidArgument(
            f"strategies[{name!r}] is a {type(strategy).__name__}, not a ringfx.Strategy. "
            f"Do: give {TABLE}."
        )
    if name != strategy.name:
        raise InvalidArgument(
            f"strategies[{name!r}] is named {strategy.name!r}. Do: give it under its own name."
        )
    if not isinstance(name, str) or not name.isidentifier() or name in TAKEN:
        raise InvalidArgument(
            f"no strategy can be named {name!r}. Do: use letters, digits and _, and none of "
            f"{', '.join(TAKEN)}."
        )
    for part in FUNCTIONS:
        value = getattr(strategy, part)
        if not callable(value):
            raise InvalidArgument(
                f"strategies[{name!r}].{part} is a {type(value).__name__}. "
                "Do: give a function; ringfx.Strategy says of what."
            )


def require_strategies(plan: Plan, strategies: Mapping[str, Strategy], where: str) -> None:
    """That a plan which was read again can be worked with: its strategies are at hand, and run.

    Raises
    ------
    InvalidArgument
        A layer's strategy is missing, or does not admit the layer.
    """
    for i, layer in enumerate(plan.layers):
        if layer.is_replicated or layer.is_local:
            continue
        strategy = planned_with(strategies).get(layer.strategy)
        if strategy is None:
            table = f'ringfx.STRATEGIES | {{"{layer.strategy}": ...}}'
            raise InvalidArgument(
                f"{where}: layers[{i}] has the strategy {layer.strategy!r}, and given are "
                f"{', '.join(strategies)}. Do: a plan holds the names of strategies, so give one "
                f"of your own again, as {Argument('strategies', Code(table))}."
            )
        if (refusal := strategy.admits(layer.site, plan.world_size)) is not None:
            raise InvalidArgument(
                f"{where} is damaged: layers[{i}]: strategy {layer.strategy!r} cannot run: "
                f"{refusal.reason}. Do: pass what Plan.to_json() or `ringfx plan --json` wrote."
            )
