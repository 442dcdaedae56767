"""Where tokens change from one split to another: between a line and what it is cut into.

A tensor of tokens that is viewed as rows and columns, or that is joined to others, may be sharded
on both sides of that call, though not along the same axis. A *reshard* is put there
(``ringfx.comm.redistribute``), which is the identity and ends the axis: each side has a line of its
own, and an all-to-all moves 1/p of the tokens where otherwise every rank would gather all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch.fx import Graph, Node

from ringfx.comm import halo, halo_pools, halo_transposed
from ringfx.comm.redistribute import reshard
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import Call
from ringfx.passes.normalize.graph_editor import GraphEditor, bounds, cat_dim
from ringfx.passes.token_axes.side_streams import side_streams
from ringfx.passes.token_axes.token_line import Lines, MaybeTokenDim, NotShardable, TokenDim

__all__ = ["insert_reshards"]

aten = torch.ops.aten


def insert_reshards(graph: Graph, axes: AxisMap, lines: Lines) -> bool:
    """Reshards around the calls that part one split from another; whether there was any."""
    reshards = _Reshards(GraphEditor(graph, axes, lines), side_streams(graph, lines))
    for node in list(graph.nodes):
        reshards.follow(node)
        rule = RULES.get(node.target)
        if rule is not None and (node.meta["val"].is_floating_point() or reshards.parts(node)):
            rule(reshards, node)
    return reshards.editor.changed


class _Reshards:
    """One reshard a value serves all calls."""

    def __init__(self, editor: GraphEditor, parted: Collection[tuple[Node, Node]]) -> None:
        self.editor = editor
        self.parted = parted
        """Calls and operands between which a stream changes to a line of its own, or back."""
        self.made: dict[tuple[Node, int, bool], Node] = {}
        self.made_of_tokens: set[Node] = set()
        """Values computed from some that are on a line, which tables and constants are not."""

    def parts(self, node: Node) -> bool:
        """Whether a stream changes its line there, whatever the type of its values."""
        return any((node, n) in self.parted for n in node.all_input_nodes)

    def follow(self, node: Node) -> None:
        inputs = node.all_input_nodes
        if any(n in self.made_of_tokens or self.token_dim(n) is not None for n in inputs):
            self.made_of_tokens.add(node)

    def token_dim(self, value: Node) -> MaybeTokenDim:
        return self.editor.token_dim(value)

    def apart(self, part: object, source: object, start: int) -> bool:
        """Whether tokens that are a part of others, from there on, are not stored with them."""
        if not isinstance(part, TokenDim) or not isinstance(source, TokenDim):
            return True
        if (part.line, part.inner) != (source.line, source.inner):
            return True
        shift = part.member.offset - source.member.offset - start
        return abs(shift) > self.editor.lines.lines[part.line].layout.chunk_length

    def before(self, node: Node, value: Node, dim: int) -> None:
        """The call reads the value resharded."""
        if value.target is reshard:
            if len(value.users) > 1:  # it goes elsewhere for others
                source = value.args[0]
                assert isinstance(source, Node)
                node.replace_input_with(value, self._make(source, dim))
            return
        self._replace(node, value, dim)

    def end(self, node: Node, value: Node, dim: int) -> None:
        """The call reads the value replicated."""
        if value.target is not reshard:
            self._replace(node, value, dim, True)

    def _replace(self, node: Node, value: Node, dim: int, ends: bool = False) -> None:
        key = (value, dim, ends)
        if key not in self.made:
            self.made[key] = self._make(value, dim, *([True] if ends else []))
        node.replace_input_with(value, self.made[key])

    def after(self, node: Node, dim: int, *ends: bool) -> None:
        """All that read the call read its result resharded."""
        if not all(user.target is reshard for user in node.users):
            new = self._make(node, dim, *ends)
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def _make(self, value: Node, dim: int, *ends: bool) -> Node:
        """Right after the value, in its own gradient mode."""
        following = value.next
        while following.op == "placeholder":
            following = following.next
        new = self.editor.make(following, reshard, value, dim, *ends)
        new.meta |= {k: v for k, v in value.meta.items() if k != "val"}
        self.editor.changed = True
        return new


def _reshape(reshards: _Reshards, node: Node) -> None:
    """Tokens on one side, and pieces of them in several dimensions on the other."""
    source = node.args[0]
    assert isinstance(source, Node)
    given, made = reshards.token_dim(source), reshards.token_dim(node)
    if _alone(given) and isinstance(made, NotShardable):
        reshards.before(node, source, given.dim)  # type: ignore[union-attr]
    if isinstance(given, NotShardable) and _alone(made):
        reshards.after(node, made.dim)  # type: ignore[union-attr]


def _product(reshards: _Reshards, node: Node) -> None:
    """Few tokens of one line with many of another: the few are gathered, the many stay sharded. Few
    that are made of many by weights (keys of Linformer) are a sum over the ranks."""
    operands = Call(node).operands
    values = {n: reshards.token_dim(n) for n in (*operands, node)}
    if not any(isinstance(place, NotShardable) for place in values.values()):
        return
    for value in dict.fromkeys((*operands, node)):
        place, size = values[value], value.meta["val"].numel()
        larger = [
            other
            for n, other in values.items()
            if isinstance(other, TokenDim) and n.meta["val"].numel() >= 2 * size
        ]
        if not _alone(place) or all(other.line == place.line for other in larger):  # type: ignore[union-attr]
            continue
        if value is node:
            reshards.after(node, place.dim, True)  # type: ignore[union-attr]
        else:
            reshards.end(node, value, place.dim)  # type: ignore[union-attr]


def _cat(reshards: _Reshards, node: Node) -> None:
    """Pieces whose tokens lie on another line than what they are joined to."""
    dim, result = cat_dim(node), reshards.token_dim(node)
    if isinstance(result, NotShardable):
        return
    if isinstance(result, TokenDim) and result.dim == dim and result.inner > 1:
        reshards.after(node, dim)
        return
    start = 0
    for piece in list(Call(node).operands):
        place = reshards.token_dim(piece)
        along = _alone(place) and place.dim == dim  # type: ignore[union-attr]
        if along and ((node, piece) in reshards.parted or reshards.apart(place, result, start)):
            reshards.before(node, piece, dim)
        start += int(piece.meta["val"].shape[dim])


def _slice(reshards: _Reshards, node: Node) -> None:
    """A part of some tokens that lies on another line than they do."""
    call = Call(node)
    source, dim = call.operands[0], call.dim("dim", len(call.shapes[0]))
    given, made = reshards.token_dim(source), reshards.token_dim(node)
    if call["step"] != 1 or call.shapes[0] == call.result_shape or isinstance(given, NotShardable):
        return
    if source not in reshards.made_of_tokens:
        return
    start, _ = bounds(call["start"], call["end"], int(call.shapes[0][dim]))
    apart = (node, source) in reshards.parted or reshards.apart(made, given, start)
    if _alone(given) and given.dim == dim and given.inner > 1 and apart:  # type: ignore[union-attr]
        reshards.before(node, source, dim)
    elif _alone(made) and made.dim == dim and apart:  # type: ignore[union-attr]
        reshards.after(node, dim)


def _pad(reshards: _Reshards, node: Node) -> None:
    """Blocks of tokens to which others are joined."""
    source = Call(node).operands[0]
    given = reshards.token_dim(source)
    if _alone(given) and given.inner > 1 and reshards.token_dim(node) is None:  # type: ignore[union-attr]
        reshards.before(node, source, given.dim)  # type: ignore[union-attr]


def _alone(place: MaybeTokenDim) -> bool:
    return isinstance(place, TokenDim) and place.outer == 1 and not place.member.is_sorted


RULES: Mapping[object, Callable[[_Reshards, Node], None]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
    halo.convolution: _reshape,
    halo_pools.pool: _reshape,
    halo_transposed.transposed_convolution: _reshape,
    aten.einsum.default: _product,
    aten.matmul.default: _product,
    aten.linear.default: _product,
    aten.bmm.default: _product,
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten._unsafe_view.default,
            aten.flatten.using_ints, aten.unflatten.int,
        ),
        _reshape,
    ),
}  # fmt: skip
