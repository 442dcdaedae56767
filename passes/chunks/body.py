"""The body of a region: its calls as a program for any number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ringfx.comm import conjugate
from ringfx.ir.token_place import TokenPlace
from ringfx.ops.chunked import Body
from ringfx.passes.axes import how
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.chunks.sizes import Sized
from ringfx.passes.rewrite import LocalProgram
from ringfx.passes.token_axes.token_line import TokenDim

__all__ = ["HELPERS", "CannotChunk", "body_of_nodes", "places_of_one_rank"]

aten = torch.ops.aten
HELPERS = frozenset({conjugate.mask_tokens})
"""Functions of ringfx that a rank's program may hold inside a region."""


class CannotChunk(Exception):
    """Why a region of the local program cannot run in chunks."""


def places_of_one_rank(local: LocalProgram) -> Mapping[Node, TokenPlace]:
    """Where the values of a program of one rank have their tokens."""
    found = ((made, local.placement.lines.token_dim(n)) for n, made in local.values.items())
    return {
        made: TokenPlace(dim=tokens.dim, outer=tokens.outer, inner=tokens.inner)
        for made, tokens in found
        if isinstance(tokens, TokenDim)
    }


def body_of_nodes(
    local: LocalProgram,
    nodes: Sequence[Node],
    entering: Sequence[Node],
    leaving: Sequence[Node],
    sized: Sized,
) -> Body:
    """The body of these calls of the local program.

    Raises
    ------
    CannotChunk
        A call holds the number of tokens in a way that cannot be left open.
    """
    graph = Graph()
    made: dict[Node, Node] = {}
    for i, value in enumerate(entering):
        made[value] = graph.placeholder(f"operand_{i}")
        made[value].meta["val"] = value.meta["val"]
    of = {local_node: value for value, local_node in local.values.items()}
    for node in nodes:
        made[node] = _copied(graph, node, made, of.get(node), local)
        made[node].meta["val"] = node.meta["val"]
    graph.output(tuple(made[n] for n in leaving))
    sums = set(local.partials.values())
    wanted = [
        i for i, n in enumerate(entering)
        if needs_grad(n) and n.meta["val"].is_floating_point()
    ]  # fmt: skip
    return Body(
        program=GraphModule(local.graph_module, graph, "RingfxChunk"),
        operands=tuple(local.tokens.get(n) for n in entering),
        results=tuple(None if n in sums else local.tokens.get(n) for n in leaving),
        wanted=tuple(wanted),
        tokens=sized.tokens,
        chunk=sized.chunk,
    )


def _copied(
    graph: Graph, node: Node, made: Mapping[Node, Node], value: Node | None, local: LocalProgram
) -> Node:
    """The call with the number of tokens left open."""
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
    # Named anew: equal regions have one text.
    new = graph.create_node(node.op, node.target, args, kwargs, name="value")
    place = local.tokens.get(node)
    named = None if value is None else local.placement.lines.axes.ops.get(value)
    family = None if named is None else named.axes.how
    if place is None or not isinstance(family, how.Reshape | how.SizeArgument):
        return new
    shape: list[Any] = [int(s) for s in node.meta["val"].shape]
    shape[place.dim] = -1
    if isinstance(family, how.Reshape):
        new.target, new.args, new.kwargs = aten.reshape.default, (new.args[0], shape), {}
        return new
    if node.target is not aten.expand.default:
        raise CannotChunk(f"{node.target} makes a tensor of as many tokens as a rank has")
    new.args = (new.args[0], shape, *new.args[2:])
    return new
