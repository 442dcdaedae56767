"""Regions of the global program that can run in chunks of tokens, and are worth it.

A region begins at products that make their tokens wider (an MLP's first layers, a projection to the
vocabulary), and goes on as long as values stay wide:

    narrow values  ->  products that widen  ->  wide values ...  ->  narrow values, or sums

Everything that enters and leaves is narrow (logits that the program returns apart: they may be
deferred). Where a few numbers a token are left, the region goes on to their sums: a loss.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from ringfx.passes.axes import how
from ringfx.passes.axes.call import AxisSharing
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.place import PlacementMap
from ringfx.passes.split_modes import CannotSplit, Placement, SplitMode, split_mode
from ringfx.passes.token_axes.token_line import Lines, TokenDim
from ringfx.torch_compat.autograd import SET_GRAD_ENABLED
from ringfx.torch_compat.operators import OpOverload, schema_of

__all__ = ["Region", "find_regions"]

WIDENS = 1.5
"""A product begins a region if its tokens are so many times wider than its operand's."""
FEW = 64
"""Bytes a token up to which values count as a few numbers: of losses, not of hidden states."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Region:
    """Calls of the global program that run in chunks together."""

    nodes: tuple[Node, ...]
    """In program order."""
    entering: tuple[Node, ...]
    leaving: tuple[Node, ...]
    """Values that are read outside of it, or sums over its tokens."""
    returned: tuple[Node, ...]
    """Wide values that the program returns: they must be deferred, or the region is none."""
    sums: bool
    """Whether all that leaves it are sums over tokens."""
    width: int
    """Bytes a token of what is wide."""
    line: int
    tokens: int
    """Of the whole line."""

    @property
    def trains(self) -> bool:
        return any(map(needs_grad, self.leaving))

    @property
    def is_loss(self) -> bool:
        """Whether its gradients can be computed with its one result: one number, whose own gradient
        only scales them."""
        is_one = len(self.leaving) == 1 and self.leaving[0].meta["val"].numel() == 1
        return is_one and self.sums and self.trains

    @property
    def name(self) -> str:
        """The module that all of it is in."""
        paths = [n.meta.get("ringfx_path", "") for n in self.nodes]
        first = next((path for path in paths if path), "")
        parts = [path.split(".") for path in paths if path] or [[]]
        depth = 0
        while all(len(p) > depth and p[depth] == parts[0][depth] for p in parts):
            depth += 1
        return ".".join(parts[0][:depth]) or first

    @property
    def source(self) -> str:
        source: str = self.nodes[0].meta.get("ringfx_source", "")
        return source


def find_regions(graph: Graph, placement: PlacementMap, *, deferrable: bool) -> tuple[Region, ...]:
    """All regions, apart from each other, in program order.

    ``deferrable``: wide values that the program returns need not be there when it ends.
    """
    local = TokenLocal(graph, placement)
    taken: set[Node] = set()
    found: list[Region] = []
    for node in graph.nodes:
        if node in taken or not local.widens(node):
            continue
        region = _Growth(local, node).region(deferrable)
        if region is not None and taken.isdisjoint(region.nodes):
            taken.update(region.nodes)
            found.append(region)
    order = {node: i for i, node in enumerate(graph.nodes)}
    return tuple(sorted(found, key=lambda r: order[r.nodes[0]]))


class TokenLocal:
    """Which calls compute each token by itself, and how wide a token of a value is."""

    def __init__(self, graph: Graph, placement: PlacementMap) -> None:
        self.graph = graph
        self.lines = placement.lines
        self.modes = _modes(graph, placement)
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self._stretch = _stretches(graph)

    def tokens(self, node: Node) -> TokenDim | None:
        """How a value has tokens of which each rank has a part; None if it has none."""
        if node.target is operator.getitem:
            return None
        mode = self.modes.get(node)
        tokens = self.lines.token_dim(node)
        if node.op == "placeholder":
            return tokens if isinstance(tokens, TokenDim) else None
        sharded = mode is not None and not mode.is_partial_sum and isinstance(tokens, TokenDim)
        return tokens if sharded and isinstance(tokens, TokenDim) else None

    def width(self, node: Node) -> float:
        """Bytes of one token of a value; 0 for what has none."""
        tokens, value = self.tokens(node), node.meta.get("val")
        if tokens is None or not isinstance(value, torch.Tensor):
            return 0.0
        return value.numel() * value.element_size() / max(tokens.member.length, 1)

    def runs(self, node: Node) -> bool:
        """Whether the call computes each token by itself, or a sum over them."""
        mode, named = self.modes.get(node), self.lines.axes.ops.get(node)
        if mode is None or named is None or not mode.is_token_local:
            return False
        if not isinstance(node.target, OpOverload) or isinstance(named.axes.how, how.Attend):
            return False
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return False
        pairs = zip(named.call.operands, mode.operands, strict=True)
        return all(
            placement is Placement.SHARDED or self.lines.token_dim(n) is None
            for n, placement in pairs
        )

    def is_alias(self, node: Node) -> bool:
        """Whether it is stored as its operand: no call of its own on a rank."""
        mode = self.modes.get(node)
        return mode is not None and mode.is_window and mode.is_free

    def joins(self, node: Node) -> bool:
        return self.runs(node) or self.is_alias(node)

    def widens(self, node: Node) -> bool:
        """Whether it contracts an axis and its tokens are wider than those that it reads."""
        named = self.lines.axes.ops.get(node)
        if named is None or not self.runs(node) or self.modes[node].is_partial_sum:
            return False
        contracts = any(x is not AxisSharing.INDEPENDENT for x in named.axes.share.values())
        read = max(map(self.width, named.call.operands), default=0.0)
        return contracts and read > 0 and self.width(node) >= WIDENS * read

    def line(self, node: Node) -> int | None:
        for x in (node, *node.all_input_nodes):
            tokens = self.lines.token_dim(x)
            if isinstance(tokens, TokenDim):
                return tokens.line
        return None

    def alike(self, node: Node) -> tuple[object, ...]:
        """Equal for calls that may stand in one region: of one line, in one mode of gradients, in
        one checkpoint."""
        return (
            self.line(node), self._stretch[node],
            node.meta.get("recompute"), node.meta.get("ac_graph_id"),
        )  # fmt: skip


def _modes(graph: Graph, placement: PlacementMap) -> Mapping[Node, SplitMode]:
    """The calls that run on a part of the tokens: of one rank those that would."""
    lines: Lines = placement.lines
    if any(line.layout.world_size > 1 for line in lines.lines):
        return placement.modes
    found: dict[Node, SplitMode] = {}
    for line in lines.lines:
        for node in graph.nodes:
            mode = split_mode(lines, node, line.index)
            if mode is None or isinstance(mode, CannotSplit) or mode.is_window or node in found:
                continue
            named = lines.axes.ops.get(node)
            is_mean = (
                named is not None
                and isinstance(named.axes.how, how.Sum)
                and (named.axes.how.mean and mode.is_partial_sum)
            )
            if not is_mean:
                found[node] = mode
    return found


def _stretches(graph: Graph) -> Mapping[Node, int]:
    """The number of the stretch between changes of gradient mode that a node stands in."""
    found, number = {}, 0
    for node in graph.nodes:
        number += node.target is SET_GRAD_ENABLED
        found[node] = number
    return found


class _Growth:
    """A region while it grows from one product.

    It ends as soon as something wide would have to enter or leave: from a wide value that an
    attention reads it would go on through all layers behind.
    """

    def __init__(self, local: TokenLocal, seed: Node) -> None:
        self.local = local
        self.alike = local.alike(seed)
        operands = local.lines.axes.ops[seed].call.operands
        self.narrow = max(map(local.width, operands))
        self.nodes: set[Node] = {seed}
        self.is_none = False
        self._grow(seed)

    def _grow(self, seed: Node) -> None:
        """Breadth first: what ends it is near."""
        todo = deque([seed])
        while todo and not self.is_none:
            node = todo.popleft()
            joining = [n for n in self._next_to(node) if n not in self.nodes]
            self.is_none = not all(map(self._fits, joining))
            joining += [n for n in self._after_alias(node) if self._may_join(n)]
            self.nodes.update(joining)
            todo.extend(joining)

    def _next_to(self, node: Node) -> Iterator[Node]:
        """Calls that must be of the region as well: they make or read what is wide."""
        if self.is_wide(node):
            yield from (n for n in node.users if n.op != "output")
        yield from filter(self.is_wide, node.all_input_nodes)

    def _after_alias(self, node: Node) -> Iterator[Node]:
        """What may go on from it: it is no call of its own."""
        if self.local.is_alias(node) and not self.is_wide(node):
            yield from node.users

    def _fits(self, node: Node) -> bool:
        return self.local.joins(node) and self.local.alike(node) == self.alike

    def _may_join(self, node: Node) -> bool:
        return node not in self.nodes and self._fits(node)

    def is_wide(self, node: Node) -> bool:
        return self.local.width(node) > self.narrow

    def region(self, deferrable: bool) -> Region | None:
        if self.is_none:
            return None
        self._close()
        self._take_sums()
        nodes = sorted(self.nodes, key=self.local.order.__getitem__)
        leaving = [n for n in nodes if any(u not in self.nodes for u in n.users)]
        wide = [n for n in leaving if self.is_wide(n)]
        returned = [n for n in wide if all(u in self.nodes or u.op == "output" for u in n.users)]
        left = [n for n in leaving if n not in returned]
        if not left or len(wide) > len(returned) or (returned and not deferrable):
            return None
        if any(self.is_wide(n) for n in self._entering(nodes)) or not self._is_convex():
            return None
        if not all(n.meta["val"].is_floating_point() for n in left):
            return None
        if not self._can_stand_at_once(nodes, left):
            return None
        width = sum(self.local.width(n) for n in nodes if self.is_wide(n) and not _is_view(n))
        if width <= sum(map(self.local.width, left)):
            return None
        line = self.local.lines.lines[int(str(self.alike[0]))]
        return Region(
            nodes=tuple(nodes),
            entering=tuple(self._entering(nodes)),
            leaving=tuple(left),
            returned=tuple(returned),
            sums=all(self.local.modes[n].is_partial_sum for n in left),
            width=int(width),
            line=line.index,
            tokens=line.length,
        )

    def _entering(self, nodes: Sequence[Node]) -> Iterator[Node]:
        read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes)
        return (n for n in read if n not in self.nodes)

    def _close(self) -> None:
        """Calls between two of the region are of it."""
        while between := self._between():
            if not all(map(self._may_join, between)):
                return
            self.nodes |= between

    def _between(self) -> set[Node]:
        after = self._reached(lambda n: n.users)
        before = self._reached(lambda n: n.all_input_nodes)
        return (after & before) - self.nodes

    def _reached(self, step: object) -> set[Node]:
        order = self.local.order
        first, last = (f(map(order.__getitem__, self.nodes)) for f in (min, max))
        found: set[Node] = set()
        todo = list(self.nodes)
        while todo:
            for n in step(todo.pop()):  # type: ignore[operator]
                if n not in found and first <= order[n] <= last:
                    found.add(n)
                    todo.append(n)
        return found

    def _is_convex(self) -> bool:
        return not self._between()

    def _can_stand_at_once(self, nodes: Sequence[Node], left: Sequence[Node]) -> bool:
        """Whether all that enters is there before any of what leaves is read."""
        order = self.local.order
        there = max((order[n] for n in self._entering(nodes)), default=-1)
        return all(order[u] > there for n in left for u in n.users if u not in self.nodes)

    def _take_sums(self) -> None:
        """Go on from a few numbers a token to their sums, if that is all that becomes of them."""
        nodes = set(self.nodes)
        todo = [n for n in nodes if not self.is_wide(n) and any(u not in nodes for u in n.users)]
        if not todo or not all(self._is_few(n) for n in todo):
            return
        while todo:
            node = todo.pop()
            if node in nodes and self.local.modes[node].is_partial_sum:
                continue
            for user in node.users:
                if user in nodes:
                    continue
                joins = self.local.joins(user) and self.local.alike(user) == self.alike
                if not joins or not self._is_few(user):
                    return
                nodes.add(user)
                todo.append(user)
        self.nodes = nodes

    def _is_few(self, node: Node) -> bool:
        return self.local.width(node) <= FEW * max(self._copies(node), 1)

    def _copies(self, node: Node) -> int:
        """Sequences of a batch, each of which has a token there."""
        tokens = self.local.tokens(node)
        value: torch.Tensor = node.meta["val"]
        if tokens is None:
            return 1
        return int(value.shape[: tokens.dim].numel()) * tokens.outer


def _is_view(node: Node) -> bool:
    returns = schema_of(node.target).returns
    return bool(returns) and returns[0].alias_info is not None
