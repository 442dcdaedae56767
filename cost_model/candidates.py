"""The strategies of one attention: what each would cost, or why it cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ringfx.cost_model.formulas import Prediction, predict
from ringfx.cost_model.profile import Profile
from ringfx.passes.values import AttentionSite

__all__ = ["Candidates", "RefusalLike", "StrategyLike", "candidates", "default_strategies"]


class RefusalLike(Protocol):
    """Why a strategy cannot run: a clause that follows its name, and what would help."""

    @property
    def reason(self) -> str: ...
    @property
    def remedy(self) -> str: ...


class StrategyLike(Protocol):
    """What the chooser needs of a row of ``ringfx.strategies.STRATEGIES``."""

    def admits(self, site: AttentionSite, world_size: int, /) -> RefusalLike | None: ...


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The strategies that could run at one site with their costs, and the others with why not."""

    site: AttentionSite
    options: tuple[Prediction, ...]
    """Fastest first; ties in the order of the table."""
    refused: Mapping[str, RefusalLike]
    noise: float = 1.0
    """Options whose times differ by less than this ratio are ties."""


def candidates(
    site: AttentionSite, world_size: int, profile: Profile, table: Mapping[str, StrategyLike]
) -> Candidates:
    """What each strategy of the table would cost at this site, or why it cannot run."""
    answers = {name: row.admits(site, world_size) for name, row in table.items()}
    options = [predict(site, n, world_size, profile) for n, no in answers.items() if no is None]
    refused = {name: no for name, no in answers.items() if no is not None}
    ordered = tuple(sorted(options, key=lambda option: option.total_ms))
    return Candidates(site=site, options=ordered, refused=refused, noise=profile.noise)


def default_strategies() -> Mapping[str, StrategyLike]:
    """Ringfx's own table; imported late, since the operators it names need not load for a test."""
    from ringfx.strategies import STRATEGIES

    return STRATEGIES
