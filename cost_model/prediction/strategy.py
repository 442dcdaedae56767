"""A strategy of distributed attention: one value with all that ringfx asks of it.

``ringfx.strategies`` has a file for each of ringfx's own, and the table ``STRATEGIES``; a user's is
made alike and given to ``ringfx.optimize(..., strategies=...)``.

Shapes: B batch, H query heads, G key/value heads, Q local queries, K local keys, D and E the head
dims of q, k and of v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from ringfx.cost_model.prediction.footprint import Calls
from ringfx.cost_model.prediction.formulas import Phase
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.cost_model.prediction.rank_share import Local
from ringfx.ir.kernel_table import Pick
from ringfx.ir.values import AttentionSite
from ringfx.ops.tiling.attention_call import Problem
from ringfx.ops.tiling.merge import Gradients

__all__ = ["Refusal", "Strategy"]


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a strategy cannot run at one attention, with the numbers, and what would help."""

    reason: str
    remedy: str


def anywhere(site: AttentionSite, world_size: int) -> Refusal | None:
    """Admits every attention."""
    return None


Forward: TypeAlias = Callable[[Problem, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(problem, q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E]) -> output [B, H, Q, E] and logsumexp
[B, H, Q] of the rank's queries over the keys of all ranks, both in the type that sums are kept in.
Every rank calls it; there are two or more."""

Backward: TypeAlias = Callable[[Problem, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Gradients]
"""(problem, gradient of the output, q, k, v, output, logsumexp) -> gradients of q, k and v."""

Time: TypeAlias = Callable[[Local, Profile, Direction, Pick], Phase]
"""(one rank's share, constants, direction, its kernels) -> seconds on the slowest rank."""

Memory: TypeAlias = Callable[[Local, Calls], Iterable[int]]
"""(one rank's share, its kernel calls in one direction) -> bytes that are held, moment by moment:
buffers and results beside q, k, v and the output's gradient."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to compute attention over tokens that are split over ranks.

    Parameters
    ----------
    name
        As plans and ``strategy=`` say it.
    gloss
        In a few words of the field, shown beside the name.
    summary
        What it does, in a line.
    forward, backward
        How it runs.
    time, memory
        What that costs, as it is predicted.
    admits
        (site, world size) -> None, or why it cannot run there.
    own_queries
        A rank computes its own queries only, and needs no other rows of a mask or bias.
    whole_queries
        Every rank has all queries and gives the output of all of them; keys stay sharded.
    math_only
        It runs with the reference kernel alone: plain products and a softmax, in bounded tiles.
    all_keys
        One kernel call meets all keys, as some kernels ask.
    num_groups
        Of a rank's share: the groups of heads that it works through one after the other, as
        ``head_groups`` of the share asks. None: it knows no groups.
    head_groups
        The groups that are asked of it (``Problem.head_groups``, ``Local.head_groups``): more hold
        less at a time, in smaller messages and calls. 0: as many as it takes by itself.
    """

    name: str
    gloss: str = ""
    summary: str
    forward: Forward
    backward: Backward
    time: Time
    memory: Memory
    admits: Callable[[AttentionSite, int], Refusal | None] = anywhere
    own_queries: bool = True
    whole_queries: bool = False
    math_only: bool = False
    all_keys: bool = False
    num_groups: Callable[[Local], int] | None = None
    head_groups: int = 0

    def in_groups(self, head_groups: int) -> Strategy:
        """The same in so many groups of heads, where it knows groups."""
        return self if self.num_groups is None else replace(self, head_groups=head_groups)

    @property
    def words(self) -> str:
        """As people read it: ``production (overlapped ring)``."""
        return f"{self.name} ({self.gloss})" if self.gloss else self.name
