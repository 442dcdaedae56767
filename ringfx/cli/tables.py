"""Tables of strategies and rules that the command line names."""

from __future__ import annotations

from collections.abc import Mapping

from ringfx.cli.model_target import find_table
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES, checked_rules
from ringfx.strategies import STRATEGIES, Strategy
from ringfx.strategies.given import checked_strategies

__all__ = ["rules_of", "strategies_of"]


def strategies_of(text: str | None) -> Mapping[str, Strategy]:
    """What ``--strategies MODULE:NAME`` names; ringfx's own where nothing is given."""
    return STRATEGIES if text is None else checked_strategies(find_table("--strategies", text))


def rules_of(text: str | None) -> AxisRules:
    """What ``--rules MODULE:NAME`` names; ringfx's own where nothing is given."""
    return RULES if text is None else checked_rules(find_table("--rules", text))
