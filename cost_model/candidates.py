"""The strategies of one attention: what each would cost, or why it cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ringfx.cost_model.formulas import Prediction, predict
from ringfx.cost_model.profile import Profile
from ringfx.passes.values import AttentionSite
from ringfx.strategies import Refusal, Strategy

__all__ = ["Candidates", "candidates"]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The strategies that could run at one site with their costs, and the others with why not."""

    site: AttentionSite
    options: tuple[Prediction, ...]
    """Fastest first; ties in the order of the table."""
    refused: Mapping[str, Refusal]
    noise: float = 1.0
    """Options whose times differ by less than this ratio are ties."""


def candidates(
    site: AttentionSite, world_size: int, profile: Profile, table: Mapping[str, Strategy]
) -> Candidates:
    """What each strategy of the table would cost at this site, or why it cannot run."""
    answers = {name: row.admits(site, world_size) for name, row in table.items()}
    options = [predict(site, n, world_size, profile) for n, no in answers.items() if no is None]
    refused = {name: no for name, no in answers.items() if no is not None}
    ordered = tuple(sorted(options, key=lambda option: option.total_ms))
    return Candidates(site=site, options=ordered, refused=refused, noise=profile.noise)
