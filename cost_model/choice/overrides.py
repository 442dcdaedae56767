"""The user's word on strategies: one name for all layers, or names for globs of module paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from ringfx.errors import InvalidArgument
from ringfx.ir.values import AttentionSite
from ringfx.units.argument import Argument

__all__ = ["AUTO", "Override", "StrategyChoice", "resolve_overrides"]

AUTO = "auto"

StrategyChoice: TypeAlias = str | Mapping[str, str]
"""``"auto"``, a strategy's name, or a mapping from globs on module paths to either."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """A strategy that the user asked for, and by which glob (None: for the whole model)."""

    strategy: str
    glob: str | None

    @property
    def words(self) -> str:
        return str(Argument("strategy", self.strategy)) if self.glob is None else f'"{self.glob}"'


def resolve_overrides(
    choice: StrategyChoice, sites: Sequence[AttentionSite], names: Sequence[str]
) -> tuple[Override | None, ...]:
    """For each site what the user asked for; None where the choice is free.

    Where several globs match a layer the last one wins, so that exceptions follow the rule.

    Raises
    ------
    InvalidArgument
        A name is no strategy, or a glob matches no layer.
    """
    globs = {"*": choice} if isinstance(choice, str) else dict(choice)
    for name in globs.values():
        _check_name(name, names)
    for glob in () if isinstance(choice, str) else globs:
        _check_glob(glob, sites)
    whole_model = isinstance(choice, str)
    return tuple(_override(site, globs, whole_model) for site in sites)


def _override(site: AttentionSite, globs: Mapping[str, str], whole_model: bool) -> Override | None:
    matching = [glob for glob in globs if whole_model or fnmatchcase(site.name, glob)]
    if not matching or globs[matching[-1]] == AUTO:
        return None
    return Override(strategy=globs[matching[-1]], glob=None if whole_model else matching[-1])


def _check_name(name: object, names: Sequence[str]) -> None:
    if name not in (AUTO, *names):
        raise InvalidArgument(
            f"unknown strategy {name!r}. Do: use one of {', '.join((AUTO, *names))}."
        )


def _check_glob(glob: str, sites: Sequence[AttentionSite]) -> None:
    if any(fnmatchcase(site.name, glob) for site in sites):
        return
    paths = list(dict.fromkeys(site.name for site in sites))
    shown = ", ".join(paths[:4]) + (f", ... ({len(paths)} in all)" if len(paths) > 4 else "")
    raise InvalidArgument(
        f"strategy: the glob {glob!r} matches no attention layer. Layers: {shown}. Do: give a glob "
        "that matches one of them; `ringfx explain MODEL` lists all."
    )
