"""Which kernels a layer may take: those of the profile's rows that the table of kernels admits.

A measured profile has rows of what ran on that machine, packages included. One of published figures
or of assumptions is for machines that nobody looked at: of its rows those count that torch itself
can call. ``formulas`` takes the fastest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.ir.kernel_table import TABLE, Call, KernelChoice, Pick, forced_kernel
from ringfx.ir.plan import LayerPlan
from ringfx.ir.tiles import CAUSAL
from ringfx.ir.values import AttentionSite
from ringfx.ops.tiling.pieces import beyond_blocks

__all__ = ["REFERENCE", "picks", "priced_as", "unmeasured", "unpriced"]

REFERENCE = "math"
"""The kernel that takes every call, in tiles whose scores are kept."""


class Kernels(Protocol):
    """What a strategy says of its kernels."""

    @property
    def math_only(self) -> bool: ...
    @property
    def all_keys(self) -> bool: ...


def picks(
    site: AttentionSite, strategy: Kernels, profile: Profile, direction: Direction
) -> tuple[Pick, ...]:
    """What a layer's direction may run with under a strategy, one or more; ties go to the first."""
    if strategy.math_only:
        return (Pick(REFERENCE),)
    call = _call(site, profile, all_keys=strategy.all_keys)
    forced = forced_kernel(call) if profile.device == "cuda" else None
    plain = _admitted(profile, call, direction) if forced is None else [forced]
    if not _has_masked_pieces(site):
        return tuple(Pick(name) for name in plain)
    masked = _admitted(profile, replace(call, masked=True), direction)
    if forced is not None and TABLE[forced].masks:
        masked = [forced]
    return tuple(Pick.of(name, other) for name in plain for other in masked)


def priced_as(profile: Profile, kernel: str) -> str:
    """The kernel whose rows say what this one costs: its own, where the profile has some."""
    return kernel if kernel in profile.kernel_names else profile.fused_kernel


def unpriced(layers: Iterable[LayerPlan], profile: Profile) -> tuple[str, ...]:
    """One note for each kernel of a plan that is predicted with another's figures."""
    if profile.kind == "observed":
        return ()
    choices = [KernelChoice.of(layer.kernel) for layer in layers]
    names = {name for x in choices for pick in (x.forward, x.backward) for name in pick.names}
    return tuple(
        f"profile {profile.name} has no figures for {name}: the figures of "
        f"{priced_as(profile, name)} are used instead"
        for name in sorted(names)
        if priced_as(profile, name) != name
    )


def unmeasured(layers: Iterable[LayerPlan], profile: Profile) -> tuple[str, ...]:
    """One note for each strategy of a split plan whose overhead nobody measured."""
    measured = {row.strategy for row in profile.overheads}
    names = {x.strategy for x in layers if not (x.is_replicated or x.is_local)} - measured
    return tuple(
        f"profile {profile.name} has no overhead of {name}: that of its most expensive strategy"
        " stands in"
        for name in sorted(names if measured else ())
    )


# --- parts ------------------------------------------------------------------------------------


def _call(site: AttentionSite, profile: Profile, *, all_keys: bool) -> Call:
    return Call(
        dtype=site.dtype,
        head_dim=max(site.head_dim, site.v_head_dim),
        soft_cap=site.spec.maps_scores,
        dropout=site.spec.dropout > 0,
        all_keys=all_keys,
        capability=round(10 * float(profile.capability)) if profile.capability else None,
    )


def _has_masked_pieces(site: AttentionSite) -> bool:
    """Whether a mask or bias is evaluated anywhere: a causal diagonal is every kernel's own."""
    spec = site.spec
    keep = beyond_blocks(spec.keep)
    is_plain = keep is None or (keep == CAUSAL and spec.q_len == spec.kv_len)
    return spec.bias is not None or not is_plain


def _admitted(profile: Profile, call: Call, direction: Direction) -> list[str]:
    """The fused kernels with rows of this type, else with any; the reference where there are none.

    The fastest in products first.
    """
    of_type = {row.kernel for row in profile.kernels if row.dtype == call.dtype}
    able = [name for name in profile.kernel_names if _admits(name, profile, call)]
    fused = [name for name in able if name in of_type] or able
    if not fused:
        return [REFERENCE]
    return sorted(fused, key=lambda name: -profile.kernel(name, call.dtype, direction).gflops)


def _admits(name: str, profile: Profile, call: Call) -> bool:
    limits = TABLE[name]
    is_here = profile.kind == "measured" or not limits.package
    on_device = limits.device == profile.device
    return name != REFERENCE and on_device and is_here and not limits.refusal(call)
