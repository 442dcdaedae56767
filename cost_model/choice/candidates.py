"""The strategies of one attention: what each would cost, or why it cannot run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ringfx.cost_model.prediction.predict import Prediction, predict
from ringfx.cost_model.prediction.profile import Profile
from ringfx.ir.values import AttentionSite
from ringfx.strategies import Refusal, Strategy

__all__ = ["Candidates", "all_candidates", "candidates"]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The strategies that could run at one site with their costs, and the others with why not."""

    site: AttentionSite
    options: tuple[Prediction, ...]
    """Fastest first; ties in the order of the table."""
    refused: Mapping[str, Refusal]
    local_only: bool = False
    """One rank: no strategy has anything to split, all are a local kernel."""
    noise: float = 1.0
    """Options whose times differ by less than this ratio are ties."""


def all_candidates(
    sites: Sequence[AttentionSite],
    world_size: int,
    profile: Profile,
    table: Mapping[str, Strategy],
    *,
    more_groups: int = 0,
) -> list[Candidates]:
    """The candidates of every site; sites that are equal but for their names are costed once.

    ``more_groups``: strategies in so many groups of heads too, where that holds less.
    """
    known: dict[AttentionSite, Candidates] = {}
    found = []
    for site in sites:
        kind = replace(site, node="", name="", source="")
        if kind not in known:
            known[kind] = candidates(site, world_size, profile, table, more_groups=more_groups)
        found.append(replace(known[kind], site=site))
    return found


def candidates(
    site: AttentionSite,
    world_size: int,
    profile: Profile,
    table: Mapping[str, Strategy],
    *,
    more_groups: int = 0,
) -> Candidates:
    """What each strategy of the table would cost at this site, or why it cannot run."""
    ranks = 1 if site.is_local else world_size
    answers = {name: row.admits(site, ranks) for name, row in table.items()}
    admitted = [table[name] for name, no in answers.items() if no is None]
    options = [predict(site, strategy, world_size, profile) for strategy in admitted]
    if more_groups and ranks > 1 and profile.kind != "observed":
        options += _in_groups(more_groups, site, admitted, options, world_size, profile)
    refused = {name: no for name, no in answers.items() if no is not None}
    ordered = tuple(sorted(options, key=lambda option: option.total_ms))
    return Candidates(
        site=site,
        options=ordered,
        refused=refused,
        local_only=ranks == 1 and profile.kind != "observed",
        noise=profile.noise,
    )


def _in_groups(
    more_groups: int,
    site: AttentionSite,
    admitted: Sequence[Strategy],
    options: Sequence[Prediction],
    world_size: int,
    profile: Profile,
) -> list[Prediction]:
    """The same strategies in so many groups of heads, where that holds less."""
    pairs = [
        (option, predict(site, strategy.in_groups(more_groups), world_size, profile))
        for strategy, option in zip(admitted, options, strict=True)
        if strategy.num_groups is not None and not strategy.head_groups
    ]
    return [less for option, less in pairs if less.workspace_bytes < option.workspace_bytes]
