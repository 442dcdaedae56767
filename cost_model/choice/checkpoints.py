"""Attention in what is computed again keeps its output, and no q, k and v.

That is so in the user's checkpointed regions, and in layers that a plan has computed again.
Attention itself is not run again, since its messages would be sent again; what leads to its inputs
is. They are then alive together with those of its neighbours in the region, while the backward of
any of them runs: they count like workspace, which is reused from region to region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

from ringfx.cost_model.choice.budget import Menu
from ringfx.cost_model.prediction.predict import Prediction
from ringfx.ir.values import AttentionSite

__all__ = ["as_held"]


def as_held(sites: Sequence[AttentionSite], menus: Sequence[Menu]) -> list[Menu]:
    """The menus with the bytes that each option adds to the peak."""
    regions = _again_by_region(sites, menus)
    held = cache(_all_held)  # equal layers have one menu
    return [
        held(tuple(menu), regions[site.checkpoint] if site.checkpoint else None)
        for site, menu in zip(sites, menus, strict=True)
    ]


def _all_held(menu: Menu, again: int | None) -> Menu:
    return tuple(_held(option, again) for option in menu)


def _held(option: Prediction, again: int | None) -> Prediction:
    """``again``: what the inputs of a checkpointed region take, of attention in one."""
    if option.attention_again:
        return replace(
            option, saved_bytes=option.layer_bytes,
            workspace_bytes=option.workspace_bytes + option.saved_bytes + option.host_bytes,
        )  # fmt: skip
    if again is None and option.recomputed:
        again = option.saved_bytes - option.result_bytes
    if again is None:
        return replace(option, saved_bytes=option.saved_bytes + option.layer_bytes)
    return replace(
        option,
        saved_bytes=option.result_bytes - option.host_result_bytes + option.layer_bytes,
        workspace_bytes=option.workspace_bytes + again + option.host_bytes,
    )


def _again_by_region(sites: Sequence[AttentionSite], menus: Sequence[Menu]) -> Mapping[int, int]:
    """What a layer saves does not depend on its strategy; where it did, the most would count."""
    regions: dict[int, int] = {}
    for site, menu in zip(sites, menus, strict=True):
        most = max((o.saved_bytes - o.result_bytes for o in menu), default=0)
        if site.checkpoint:
            regions[site.checkpoint] = regions.get(site.checkpoint, 0) + most
    return regions
