"""Which attentions are local: ranks share their batch, not their tokens."""

from __future__ import annotations

from dataclasses import replace

from ringfx.ir.values import Sites
from ringfx.passes.place.min_cut import PlacementMap
from ringfx.passes.split_modes import LocalAttention

__all__ = ["local_sites"]


def local_sites(sites: Sites, placement: PlacementMap) -> Sites:
    """The sites, each with whether the placement makes it local."""
    local = {n.name for n, mode in placement.modes.items() if isinstance(mode, LocalAttention)}
    return replace(sites, found=tuple(replace(x, is_local=x.node in local) for x in sites.found))
