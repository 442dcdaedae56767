"""Conversions of values between placements: one for each value and placement, made where it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from types import FunctionType

from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from ringfx.comm import (
    conjugate,
    halo,
    halo_pools,
    halo_transposed,
    mirror,
    redistribute,
    reductions,
    scans,
    turn,
)
from ringfx.ir.markers import SENT_AGAIN
from ringfx.ir.values import CommKind
from ringfx.ops import attention
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.place import PlacementMap
from ringfx.passes.split_modes import LocalGraph, Placement
from ringfx.passes.split_modes.local_graph import COMPLETES_GRADIENT, describe, num_bytes
from ringfx.passes.token_axes.token_line import TokenDim
from ringfx.torch_compat.autograd import SET_GRAD_ENABLED

__all__ = ["PlacementConversions", "save_collectives"]

_SENDS = frozenset(
    {
        attention, conjugate.all_gather_grad_reduce_scatter, conjugate.all_gather_grad_slice,
        conjugate.sum_partials,
        redistribute.move_tokens, halo.convolve_tokens, halo.roll_tokens, halo.shift_tokens,
        halo_pools.pool_tokens, halo_transposed.transposed_tokens,
        mirror.flip_tokens, scans.scan_tokens, scans.scan_with_places, reductions.softmax_tokens,
        reductions.log_softmax_tokens, reductions.logsumexp_of_tokens,
        reductions.extreme_of_tokens, reductions.first_extreme, reductions.truth_of_tokens,
        turn.turn_tokens,
    }
)  # fmt: skip


class PlacementConversions:
    """Makes and remembers every conversion of one rewrite."""

    def __init__(
        self,
        local: LocalGraph,
        placement: PlacementMap,
        as_produced: Mapping[Node, Node],
        partial: Collection[Node] = (),
    ) -> None:
        self.local = local
        self.placement = placement
        self.as_produced = as_produced
        """Global value -> the local node that made it."""
        self.partial = partial
        """Values that are made with a partial gradient."""
        self._on_first_use: dict[Node, Callable[[], None]] = {}
        self._made: dict[tuple[Node, Placement], Node] = {}
        self._rows: dict[tuple[Node, TokenDim], Node] = {}
        self._seen: Node | None = None
        """How far the program so far was searched for regions without gradients."""
        self._enabled = True
        self._last_enabled: Node | None = None

    def convert(self, value: Node, wanted: Placement, user: Node) -> Node:
        """The value in the wanted placement, for a user that the plan names as the reason."""
        if wanted is Placement.RANK_LOCAL or value in self.partial:
            return self.as_produced[value]
        sharded = self.placement.is_sharded(value)
        if wanted is Placement.REPLICATED_PARTIAL_GRAD and not needs_grad(value):
            wanted = Placement.REPLICATED
        has_part_of_gradient = wanted is Placement.REPLICATED_PARTIAL_GRAD
        if sharded == (wanted is Placement.SHARDED) and not has_part_of_gradient:
            return self.as_produced[value]
        key = (value, wanted)
        if has_part_of_gradient and value in self._on_first_use and key not in self._made:
            self._on_first_use[value]()
        if key not in self._made:
            self._made[key] = self._make(value, wanted, user)
        return self._made[key]

    def rows(self, value: Node, along: TokenDim, user: Node) -> Node:
        """This rank's rows of a replicated value of which one dimension is tokens."""
        if (value, along) not in self._rows:
            self._rows[value, along] = self._make(value, Placement.SHARDED, user, along)
        return self._rows[value, along]

    def remember(self, value: Node, placement: Placement, node: Node) -> None:
        self._made[value, placement] = node

    def on_first_use(self, value: Node, make: Callable[[], None]) -> None:
        """``make`` remembers a value with a partial gradient just before the first call that needs
        it.

        It is called where gradients are enabled: standing in a no-grad region the conversion would
        lose the gradient of later users.
        """

        def here() -> None:
            with self._last_with_gradients():
                make()

        self._on_first_use[value] = here

    @property
    def _graph(self) -> Graph:
        return self.local.graph

    def _last_with_gradients(self) -> AbstractContextManager[None]:
        """The end of the program so far, or before the no-grad region that it ends in."""
        seen = self._seen or self.local.last_input
        last_enabled = self._last_enabled or self.local.last_input
        assert seen is not None
        assert last_enabled is not None
        while seen.next.op != "root":
            seen = seen.next
            if seen.target is SET_GRAD_ENABLED:
                self._enabled = bool(seen.args[0])
            if self._enabled:
                last_enabled = seen
        self._seen, self._last_enabled = seen, last_enabled
        if self._enabled:
            return contextlib.nullcontext()
        place: AbstractContextManager[None] = self._graph.inserting_after(last_enabled)
        return place

    def _make(
        self, value: Node, wanted: Placement, user: Node, along: TokenDim | None = None
    ) -> Node:
        made = self.as_produced[value]
        tokens = along or self.placement.lines.token_dim(value)
        gathers = along is None and self.placement.is_sharded(value)
        if gathers or wanted is Placement.SHARDED:
            assert isinstance(tokens, TokenDim), f"{value.name} has no token axis"
            self.local.index(tokens)  # all are made before the insertion point is sought
            self.local.order(tokens)
            self.local.valid(tokens)
        is_input = made.op == "placeholder"
        after = self.local.after_inputs() if is_input else self.local.after_conversions(made)
        with self._graph.inserting_after(after):
            if wanted is Placement.SHARDED:
                assert isinstance(tokens, TokenDim)
                new = self._shard(value, tokens)
                self.local.holds_tokens(new, tokens)
            elif gathers:
                assert isinstance(tokens, TokenDim)
                new = self._gather(value, tokens, wanted, user)
            else:
                new = self._complete_gradient(value)
        new.meta.update({k: v for k, v in made.meta.items() if k != "val"})
        new.meta["ringfx_conversion"] = True
        return new

    def _complete_gradient(self, value: Node) -> Node:
        size, args = num_bytes(value), (self.as_produced[value], self.local.group, describe(value))
        self._report_gradient(value, CommKind.ALL_REDUCE, size)
        return self._graph.call_function(conjugate.identity_grad_all_reduce, args)

    def _shard(self, value: Node, tokens: TokenDim) -> Node:
        where = self.local.where(tokens, value)
        index, order = self.local.index(tokens), self.local.order(tokens)
        if needs_grad(value):
            self._report_gradient(value, CommKind.ALL_GATHER_GRADIENT, num_bytes(value))
        args = (self.as_produced[value], index, order, *where)
        return self._graph.call_function(conjugate.slice_tokens, args)

    def _gather(self, value: Node, tokens: TokenDim, wanted: Placement, user: Node) -> Node:
        made, where = self.as_produced[value], self.local.where(tokens, value)
        index, order, valid = (
            make(tokens) for make in (self.local.index, self.local.order, self.local.valid)
        )
        reason = self.placement.reasons.get(user, "it needs all tokens")
        text = f"{_name(user)}: {reason}"
        self.local.report(value, CommKind.ALL_GATHER, num_bytes(value), text)
        if wanted is Placement.REPLICATED_PARTIAL_GRAD:
            self._report_gradient(value, CommKind.REDUCE_SCATTER, num_bytes(value) // where[0])
            return self._graph.call_function(
                conjugate.all_gather_grad_reduce_scatter, (made, order, *where)
            )
        args = (made, index, order, valid, *where)
        return self._graph.call_function(conjugate.all_gather_grad_slice, args)

    def _report_gradient(self, value: Node, kind: CommKind, size: int) -> None:
        self.local.report(value, kind, size, COMPLETES_GRADIENT, in_backward=True)


def save_collectives(graph: Graph) -> None:
    """In checkpointed regions what was sent is saved: a recompute must not send it again, but for
    attention of which a plan says so."""
    for node in graph.nodes:
        sends = node.target in _SENDS and not node.meta.get(SENT_AGAIN)
        if "recompute" in node.meta and sends:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _name(node: Node) -> str:
    if isinstance(node.target, FunctionType):
        return f"ringfx.{node.target.__name__}"
    return str(node.target) if node.op == "call_function" else node.op
