"""Where tokens change from one split to another: between a line and what it is cut into.

A tensor of tokens that is viewed as rows and columns, or that is joined to others, may be split on
either side of that call, though not in the same way. There a *relay* is put
(``ringfx.comm.redistribute``), which is the identity and ends the axis: each side has a line of its
own, and ranks exchange 1/p of the tokens where otherwise every rank would gather all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.fx import Graph, Node

from ringfx.comm import halo
from ringfx.comm.redistribute import relay
from ringfx.passes.axes import AxisMap
from ringfx.passes.axes.call import Call
from ringfx.passes.normalize.graph_editor import Speller, bounds, cat_dim
from ringfx.passes.token_axes.token_line import Carried, Lines, Tangle

__all__ = ["insert_relays"]

aten = torch.ops.aten


def insert_relays(graph: Graph, axes: AxisMap, lines: Lines) -> bool:
    """Relays around the calls that part one split from another; whether there was any."""
    relays = _Relays(Speller(graph, axes, lines))
    for node in list(graph.nodes):
        relays.follow(node)
        rule = RULES.get(node.target)
        if rule is not None and node.meta["val"].is_floating_point():
            rule(relays, node)
    return relays.speller.changed


class _Relays:
    """One relay a value serves all calls."""

    def __init__(self, speller: Speller) -> None:
        self.speller = speller
        self.made: dict[tuple[Node, int, bool], Node] = {}
        self.made_of_tokens: set[Node] = set()
        """Values computed from some that are on a line, which tables and constants are not."""

    def follow(self, node: Node) -> None:
        inputs = node.all_input_nodes
        if any(n in self.made_of_tokens or self.carried(n) is not None for n in inputs):
            self.made_of_tokens.add(node)

    def carried(self, value: Node) -> Carried | Tangle | None:
        return self.speller.carried(value)

    def apart(self, part: object, whole: object, start: int) -> bool:
        """Whether tokens that are a part of others, from there on, are not stored with them."""
        if not isinstance(part, Carried) or not isinstance(whole, Carried):
            return True
        if (part.line, part.inner) != (whole.line, whole.inner):
            return True
        shift = part.member.offset - whole.member.offset - start
        return abs(shift) > self.speller.lines.lines[part.line].layout.chunk_length

    def before(self, node: Node, value: Node, dim: int) -> None:
        """The call reads the value relayed."""
        if value.target is relay:
            if len(value.users) > 1:  # it goes elsewhere for others
                source = value.args[0]
                assert isinstance(source, Node)
                node.replace_input_with(value, self._make(source, dim))
            return
        self._replace(node, value, dim)

    def end(self, node: Node, value: Node, dim: int) -> None:
        """The call reads the value whole."""
        if value.target is not relay:
            self._replace(node, value, dim, True)

    def _replace(self, node: Node, value: Node, dim: int, ends: bool = False) -> None:
        key = (value, dim, ends)
        if key not in self.made:
            self.made[key] = self._make(value, dim, *([True] if ends else []))
        node.replace_input_with(value, self.made[key])

    def after(self, node: Node, dim: int) -> None:
        """All that read the call read its result relayed."""
        if not all(user.target is relay for user in node.users):
            new = self._make(node, dim)
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def _make(self, value: Node, dim: int, *ends: bool) -> Node:
        """Right after the value, in its own gradient mode."""
        following = value.next
        while following.op == "placeholder":
            following = following.next
        new = self.speller.make(following, relay, value, dim, *ends)
        new.meta |= {k: v for k, v in value.meta.items() if k != "val"}
        self.speller.changed = True
        return new


def _reshape(relays: _Relays, node: Node) -> None:
    """Tokens on one side, and pieces of them in several dimensions on the other."""
    source = node.args[0]
    assert isinstance(source, Node)
    given, made = relays.carried(source), relays.carried(node)
    if _alone(given) and made is Tangle.TANGLED:
        relays.before(node, source, given.dim)  # type: ignore[union-attr]
    if given is Tangle.TANGLED and _alone(made):
        relays.after(node, made.dim)  # type: ignore[union-attr]


def _product(relays: _Relays, node: Node) -> None:
    """Few tokens of one line with many of another: the few are whole, and the many stay split."""
    operands = Call(node).operands
    values = {n: relays.carried(n) for n in (*operands, node)}
    if not any(place is Tangle.TANGLED for place in values.values()):
        return
    for value in dict.fromkeys(operands):
        place, size = values[value], value.meta["val"].numel()
        larger = [
            other
            for n, other in values.items()
            if isinstance(other, Carried) and n.meta["val"].numel() >= 2 * size
        ]
        if _alone(place) and any(other.line != place.line for other in larger):  # type: ignore[union-attr]
            relays.end(node, value, place.dim)  # type: ignore[union-attr]


def _cat(relays: _Relays, node: Node) -> None:
    """Pieces whose tokens lie on another line than what they are joined to."""
    dim, result = cat_dim(node), relays.carried(node)
    if result is Tangle.TANGLED:
        return
    if isinstance(result, Carried) and result.dim == dim and result.inner > 1:
        relays.after(node, dim)
        return
    start = 0
    for piece in list(Call(node).operands):
        place = relays.carried(piece)
        along = _alone(place) and place.dim == dim  # type: ignore[union-attr]
        if along and relays.apart(place, result, start):
            relays.before(node, piece, dim)
        start += int(piece.meta["val"].shape[dim])


def _slice(relays: _Relays, node: Node) -> None:
    """A part of some tokens that lies on another line than they do."""
    call = Call(node)
    source, dim = call.operands[0], call.dim("dim", len(call.shapes[0]))
    given, made = relays.carried(source), relays.carried(node)
    if call["step"] != 1 or call.shapes[0] == call.result_shape or given is Tangle.TANGLED:
        return
    if source not in relays.made_of_tokens:
        return
    start, _ = bounds(call["start"], call["end"], int(call.shapes[0][dim]))
    apart = relays.apart(made, given, start)
    if _alone(given) and given.dim == dim and given.inner > 1 and apart:  # type: ignore[union-attr]
        relays.before(node, source, dim)
    elif _alone(made) and made.dim == dim and apart:  # type: ignore[union-attr]
        relays.after(node, dim)


def _pad(relays: _Relays, node: Node) -> None:
    """Blocks of tokens to which others are joined."""
    source = Call(node).operands[0]
    given = relays.carried(source)
    if _alone(given) and given.inner > 1 and relays.carried(node) is None:  # type: ignore[union-attr]
        relays.before(node, source, given.dim)  # type: ignore[union-attr]


def _alone(place: Carried | Tangle | None) -> bool:
    return isinstance(place, Carried) and place.outer == 1 and not place.member.is_sorted


RULES: Mapping[object, Callable[[_Relays, Node], None]] = {
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
    halo.convolution: _reshape,
    aten.einsum.default: _product,
    aten.matmul.default: _product,
    aten.bmm.default: _product,
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten._unsafe_view.default,
            aten.flatten.using_ints, aten.unflatten.int,
        ),
        _reshape,
    ),
}  # fmt: skip
