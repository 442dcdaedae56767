"""The strategies of distributed attention, a file each: how it runs, where it can, what it costs.

A table of strategies is an ordinary mapping that is handed down: ``STRATEGIES | {"mine": ...}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ringfx.cost_model.prediction.strategy import Refusal, Strategy
from ringfx.strategies.collective import COLLECTIVE
from ringfx.strategies.production import PRODUCTION
from ringfx.strategies.simple import SIMPLE
from ringfx.strategies.split_kv import SPLIT_KV
from ringfx.strategies.ulysses import ULYSSES

__all__ = ["DEFAULT", "SPLIT_KV", "STRATEGIES", "Refusal", "Strategy", "planned_with"]

STRATEGIES: MappingProxyType[str, Strategy] = MappingProxyType(
    {strategy.name: strategy for strategy in (SIMPLE, COLLECTIVE, PRODUCTION, ULYSSES)}
)


def planned_with(strategies: Mapping[str, Strategy]) -> Mapping[str, Strategy]:
    """All that a layer of a plan may name: those to choose from, and that of few queries."""
    return {**strategies, SPLIT_KV.name: SPLIT_KV}


DEFAULT = PRODUCTION.name
"""Where nothing was chosen: in calls by hand, in programs that are not planned yet, on one rank."""
