"""The strategies of distributed attention, a file each: how it runs, where it can, what it costs.

A table of strategies is an ordinary mapping that is handed down: ``STRATEGIES | {"mine": ...}``.
"""

from __future__ import annotations

from types import MappingProxyType

from ringfx.cost_model.prediction.strategy import Refusal, Strategy, refuse_dropout
from ringfx.strategies.collective import COLLECTIVE
from ringfx.strategies.production import PRODUCTION
from ringfx.strategies.simple import SIMPLE
from ringfx.strategies.ulysses import ULYSSES

__all__ = ["DEFAULT", "STRATEGIES", "Refusal", "Strategy", "refuse_dropout"]

STRATEGIES: MappingProxyType[str, Strategy] = MappingProxyType(
    {strategy.name: strategy for strategy in (SIMPLE, COLLECTIVE, PRODUCTION, ULYSSES)}
)

DEFAULT = PRODUCTION.name
"""Where nothing was chosen: in calls by hand, in programs that are not planned yet, on one rank."""
