"""The strategies of distributed attention as values in one table.

A strategy says in words what it does and at which attentions it can run. What it costs is in
``cost_model/``, how it runs is in ``ringfx/ops/``; both are keyed by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringfx.ir.values import AttentionSite

__all__ = ["REPLICATED", "STRATEGIES", "Refusal", "Strategy"]

REPLICATED = "replicated"
"""In place of a strategy: attention that every rank computes whole, with the local kernel."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a strategy cannot run at one attention, with the numbers, and what would help."""

    reason: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to compute attention over tokens that are split over ranks."""

    name: str
    summary: str
    admits: Callable[[AttentionSite, int], Refusal | None]
    """(site, world size) -> None, or why not."""
    own_queries: bool = True
    """A rank computes its own queries only, and needs no other rows of a mask or bias."""
    gloss: str = ""
    """Two or three words beside the name wherever people read it: ``overlapped ring``."""


def _no_dropout(site: AttentionSite, world_size: int) -> Refusal | None:
    if site.spec.dropout == 0.0:
        return None
    return Refusal(
        reason=f"attention dropout of {site.spec.dropout:g} in training: its random mask would "
        "depend on how the tokens are split, and then so would the result",
        remedy="set the model's attention dropout to 0, or call model.eval()",
    )


def _heads_divide(site: AttentionSite, world_size: int) -> Refusal | None:
    refusal = _no_dropout(site, world_size)
    if refusal is None and site.row_bytes:
        refusal = Refusal(
            reason='"ulysses" computes all queries of some heads, and each rank has only its own '
            "queries' rows of the scores that are added to them",
            remedy='use "production" or "collective"',
        )
    if refusal is not None or site.heads % world_size == 0:
        return refusal
    divisors = [str(p) for p in range(2, site.heads + 1) if site.heads % p == 0]
    ranks = f"a number of ranks that divides them ({', '.join(divisors)})" if divisors else "1 rank"
    return Refusal(
        reason=f'"ulysses" needs heads % ranks == 0; here {site.heads} heads, {world_size} ranks',
        remedy=f'use {ranks}, or "production"',
    )


STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            name="simple",
            gloss="reference ring",
            summary="ring of K/V, plain matmul and softmax on bounded tiles; the reference",
            admits=_no_dropout,
        ),
        Strategy(
            name="collective",
            gloss="all-gather of K/V",
            summary="one all-gather of K/V, then fused attention of the local queries",
            admits=_no_dropout,
        ),
        Strategy(
            name="production",
            gloss="overlapped ring",
            summary="ring of K/V with the next block in flight, fused kernels, empty tiles skipped",
            admits=_no_dropout,
        ),
        Strategy(
            name="ulysses",
            gloss="all-to-all of heads",
            summary="all-to-all of heads for tokens, fused attention of whole sequences, and back",
            admits=_heads_divide,
            own_queries=False,
        ),
    )
}
