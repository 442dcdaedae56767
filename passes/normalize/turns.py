"""Where tokens are traded for another dimension: around calls that need all of them.

A Fourier transform, a sort, a median or a linear layer along the tokens needs all of a row, and
treats each channel by itself. So its operand is *turned* (``ringfx.comm.turn``): an all-to-all
gives each rank whole rows of 1/p of the channels. What follows stays so as long as it needs nothing
else: the filter between a transform and its inverse, the activation between two layers of a mixer.
Where its result meets tokens again, it is turned back. Between the turns the channels are the token
axis; each turn ends one axis and starts another, so that the two never meet in a tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from ringfx.comm.redistribute import reshard
from ringfx.comm.turn import apart, turn
from ringfx.passes.axes import AxisMap, how
from ringfx.passes.axes.call import AxisSharing, Labels, result_values
from ringfx.passes.axes.propagate import NamedOp
from ringfx.passes.axes.rules.views import RULES as VIEWS
from ringfx.passes.axes.space import Dim
from ringfx.passes.normalize.graph_editor import GraphEditor
from ringfx.passes.token_axes.token_line import Lines, TokenDim

__all__ = ["insert_turns"]

LESS = 2
"""By so much a sum over tokens is smaller than what it sums: its parts are added, not turned."""


def insert_turns(graph: Graph, axes: AxisMap, lines: Lines, held: Collection[Node]) -> bool:
    """Turns around calls that need all tokens of each channel; whether there was any.

    ``held``: inputs that modules hold.
    """
    ranks = max((line.layout.world_size for line in lines.lines), default=1)
    found = _Turned(GraphEditor(graph, axes, lines), ranks, _fixed(graph, held))
    for node in list(graph.nodes):
        found.visit(node)
    found.insert()
    return found.editor.changed


def _fixed(graph: Graph, held: Collection[Node]) -> set[Node]:
    """What is computed of parameters and constants alone."""
    found = set(held)
    for node in graph.nodes:
        is_made = node.op == "call_function" and found.issuperset(node.all_input_nodes)
        if is_made or node.op == "get_attr":
            found.add(node)
    return found


@dataclass
class _Turned:
    """Calls that run on whole rows of some channels, and where values enter and leave them."""

    editor: GraphEditor
    ranks: int
    fixed: Collection[Node]
    """Tables and weights: they hold no tokens of a rank's own."""
    channels: dict[Node, Dim] = field(default_factory=dict)
    """For each call that is turned, the axis that is split."""
    rows: set[Dim] = field(default_factory=set)
    """Axes that such calls made, of which every rank has all."""
    enter: list[tuple[Node, Node]] = field(default_factory=list)
    """Call and operand that is turned for it."""
    leave: list[tuple[Node, Node]] = field(default_factory=list)
    """Call and operand that is turned back for it."""
    beside: list[tuple[Node, Node]] = field(default_factory=list)
    """Call that is turned, and an operand of it that is not."""

    @property
    def axes(self) -> AxisMap:
        return self.editor.axes

    def visit(self, node: Node) -> None:
        """Say of one call whether it is turned, in program order."""
        inside = [n for n in node.all_input_nodes if n in self.channels]
        if node.op == "output":
            self.leave += [(node, n) for n in inside if self._has_tokens(n)]
            return
        named = self.axes.ops.get(node)
        if named is None:  # one of several results
            if inside:
                self.channels[node] = self.channels[inside[0]]
            return
        entering = [n for n in dict.fromkeys(named.call.operands) if self._enters(n)]
        axis = self._axis(named, inside, entering)
        if axis:
            self._join(named, axis, entering)
        elif inside and not self._adds_up(named):
            self.leave += [(node, n) for n in dict.fromkeys(inside)]

    # --- which calls

    def _axis(self, named: NamedOp, inside: list[Node], entering: list[Node]) -> Dim:
        """The axis along which a call is split instead of its tokens; () if it is not."""
        operands, family = named.call.operands, named.axes.how
        is_routed = any(named.call.node in route.nodes for route in self.editor.lines.routes)
        if named.clash or is_routed or isinstance(family, how.Attend | how.Reshard):
            return ()
        labels = dict(zip(operands, named.axes.operands, strict=True))
        size = sum(n.meta["val"].numel() for n in entering)
        if not all(_needs_all(named, self._tokens(n), labels[n], size) for n in entering):
            return ()
        axes = {self.channels[n] for n in inside}
        if not axes and entering:
            axes = self._others(entering[0])
        elif len(axes) > 1:
            return ()
        found = [a for a in axes if _runs_along(self.axes, named, a, [*inside, *entering])]
        return max(found, key=lambda a: (not self._size(a) % self.ranks, self._size(a)), default=())

    def _others(self, operand: Node) -> set[Dim]:
        """The dimensions beside an operand's tokens that are long enough."""
        tokens, dims = self._tokens(operand), self.axes.dims(operand)
        return {
            axis
            for d, axis in enumerate(dims)
            if tokens and d != tokens.dim and self._size(axis) >= self.ranks
        }

    def _adds_up(self, named: NamedOp) -> bool:
        """Whether each rank may sum over its channels, so that nothing is turned back for it."""
        operands, labels = named.call.operands, named.axes.operands[0]
        if len(operands) != 1 or labels is None or self._has_tokens(named.call.node):
            return False
        place = _place(self.axes.dims(operands[0]), self.channels[operands[0]])
        shares = set() if place is None else {named.axes.share_of(x) for x in labels[place]}
        return shares == {AxisSharing.PARTIAL_SUM}

    def _join(self, named: NamedOp, axis: Dim, entering: list[Node]) -> None:
        node = named.call.node
        self.channels[node] = axis
        self.enter += [(node, n) for n in entering]
        others = (n for n in named.call.operands if n not in self.channels and n not in entering)
        self.beside += [(node, n) for n in others]
        given = {d for n in named.call.operands if n in self.channels for d in self.axes.dims(n)}
        given |= {d for n in entering for d in self.axes.dims(n)}
        for i in range(len(result_values(node))):
            self.rows |= set(self.axes.dims(node, i)) - given - {()}

    # --- where values enter and leave

    def insert(self) -> None:
        """Turn them there."""
        made: dict[tuple[Node, object], Node] = {}
        for node, operand in self.enter:
            tokens = self._tokens(operand)
            assert tokens is not None
            place = _place(self.axes.dims(operand), self.channels[node])
            self._replace(made, node, operand, turn, tokens.dim, place)
        for node, operand in self.leave:
            dims = self.axes.dims(operand)
            place, back = _place(dims, self.channels[operand]), self._back(node, operand)
            if back is None:
                self._replace(made, node, operand, reshard, place, True)
            else:
                self._replace(made, node, operand, turn, place, back)
        for node, operand in self.beside:
            if self._is_shared(operand):
                self._replace(made, node, operand, apart)

    def _back(self, node: Node, operand: Node) -> int | None:
        """The dimension along which a call takes an operand split again; None: whole."""
        tokens = self._tokens(operand)
        if tokens is not None:
            return tokens.dim
        if self._has_tokens(operand) or any(
            self._has_tokens(n) and n not in self.channels for n in node.all_input_nodes
        ):
            return None
        dims = self.axes.dims(operand)
        long = [
            d
            for d, axis in enumerate(dims)
            if axis in self.rows and self._size(axis) >= 2 * self.ranks
        ]
        return long[0] if len(long) == 1 else None

    def _is_shared(self, operand: Node) -> bool:
        """Whether what an operand is computed of is read elsewhere too: then its axes are those."""
        seen, left = {operand}, [operand]
        while left:
            value = left.pop()
            if not (set(value.users) - seen).issubset(self.channels):
                return True
            new = [n for n in value.all_input_nodes if n not in seen]
            seen |= set(new)
            left += new
        return False

    def _replace(
        self, made: dict[tuple[Node, object], Node], node: Node, operand: Node, marker: object,
        *args: object,
    ) -> None:  # fmt: skip
        key = (operand, (marker, *args))
        if key not in made:
            following = operand.next
            while following.op == "placeholder":
                following = following.next
            new = self.editor.make(following, marker, operand, *args)  # type: ignore[arg-type]
            new.meta |= {k: v for k, v in operand.meta.items() if k != "val"}
            made[key] = new
        node.replace_input_with(operand, made[key])
        self.editor.changed = True

    # --- tokens

    def _tokens(self, node: Node) -> TokenDim | None:
        found = self.editor.token_dim(node)
        return found if isinstance(found, TokenDim) else None

    def _has_tokens(self, node: Node) -> bool:
        return self.editor.token_dim(node) is not None

    def _enters(self, node: Node) -> bool:
        """Whether a call that is turned needs a value to be turned."""
        return node not in self.channels and node not in self.fixed and self._has_tokens(node)

    def _size(self, axis: Dim) -> int:
        return self.axes.space.size(axis)


def _needs_all(named: NamedOp, tokens: TokenDim | None, labels: Labels | None, size: int) -> bool:
    """Whether a call cannot run on a part of an operand's tokens, nor exchange a few of them.

    ``size``: elements of all operands that would be turned.
    """
    family = named.axes.how
    is_view = named.call.node.target in VIEWS or bool(named.axes.windows)
    if tokens is None or tokens.member.is_sorted or labels is None or is_view:
        return False
    if family is not None and not isinstance(family, how.Sum):
        return False
    shares = {named.axes.share_of(x) for x in labels[tokens.dim]}
    if shares == {AxisSharing.PARTIAL_SUM}:
        call = named.call
        return len(call.operands) > 1 and LESS * call.result_shape.numel() > size
    return AxisSharing.NEEDS_ALL in shares


def _runs_along(axes: AxisMap, named: NamedOp, axis: Dim, turned: Collection[Node]) -> bool:
    """Whether a call treats each element of an axis by itself, and keeps it in all results."""
    call = named.call
    results = range(len(result_values(call.node)))
    if not results or any(_place(axes.dims(call.node, i), axis) is None for i in results):
        return False
    if isinstance(named.axes.how, how.Reshape):
        return True
    for operand, labels in zip(call.operands, named.axes.operands, strict=True):
        dims = axes.dims(operand)
        place = _place(dims, axis)
        if place is None or labels is None:
            if operand in turned or any(set(axis) & set(dim) for dim in dims):
                return False
            continue
        names = labels[place]
        if len(names) != 1 or named.axes.share_of(names[0]) is not AxisSharing.INDEPENDENT:
            return False
    return True


def _place(dims: tuple[Dim, ...], axis: Dim) -> int | None:
    """The dimension that an axis is, if it is one and a part of no other."""
    found = [d for d, dim in enumerate(dims) if set(dim) & set(axis)]
    return found[0] if len(found) == 1 and dims[found[0]] == axis else None
