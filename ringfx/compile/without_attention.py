"""What a plan says of a model without attention: what its tokens are, and how much is split."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch.fx import Node

from ringfx.compile.computed_whole import computed
from ringfx.errors import InvalidArgument
from ringfx.ir.note import Note, NoteKind, noted
from ringfx.ir.values import Captured, Declined, Sites
from ringfx.passes.axes.call import result_values
from ringfx.passes.place import PlacementMap
from ringfx.units.argument import Argument, Code
from ringfx.units.format import format_bytes

__all__ = ["given_dims", "notes_without_attention"]


def given_dims(
    captured: Captured,
    token_dims: Mapping[str, int],
    sites: Sites,
    world_size: int,
    *,
    is_whole: bool,
) -> Mapping[Node, int]:
    """The inputs that ``token_dims`` names, and their dimension of tokens.

    Where the program is not the whole model, those of them that it has: others belong to another
    program, and attention in this one says what its tokens are.

    Raises
    ------
    InvalidArgument
        There is attention, which says what the tokens are; or no such input, dimension or length.
    """
    if not token_dims:
        return {}
    words = " ".join(f"{name}={dim}" for name, dim in token_dims.items())
    asked = Argument("token_dims", Code(str(dict(token_dims)), words))
    if sites.found and not is_whole:
        return {}
    if sites.found:
        first = sites.found[0]
        raise InvalidArgument(
            f"{asked}: attention was found ({first.name or 'top level'}, {first.source}), which "
            f"says what the tokens are. Do: leave {Argument('token_dims')} out."
        )
    nodes = captured.graph_module.graph.find_nodes(op="placeholder")
    inputs = {
        name: node
        for number, (name, node) in enumerate(zip(captured.input_names, nodes, strict=True))
        if number not in captured.held and result_values(node)
    }
    found: dict[Node, int] = {}
    for name, dim in token_dims.items():
        if name not in inputs and not is_whole:
            continue
        if name not in inputs:
            listed = ", ".join(f"{k} {list(n.meta['val'].shape)}" for k, n in inputs.items())
            raise InvalidArgument(
                f"{asked}: no input is called {name!r}. Inputs: {listed}. Do: name one of them."
            )
        shape = inputs[name].meta["val"].shape
        if not -len(shape) <= dim < len(shape):
            raise InvalidArgument(
                f"{asked}: {name} {list(shape)} has no dimension {dim}. Do: give one from 0 to "
                f"{len(shape) - 1}."
            )
        if shape[dim] < max(world_size, 2):
            raise InvalidArgument(
                f"{asked}: dimension {dim} of {name} {list(shape)} has too few elements for "
                f"{world_size} ranks. Do: give a longer one, or fewer ranks."
            )
        found[inputs[name]] = dim % len(shape)
    return found


def notes_without_attention(
    captured: Captured, placement: PlacementMap, declined: Collection[Declined], world_size: int,
    *, is_given: bool,
) -> tuple[Note, ...]:  # fmt: skip
    """None where attention says what the tokens are, or where nothing can be.

    ``is_given``: the user has said what the tokens are.
    """
    inputs = placement.lines.inputs
    if not inputs:
        return ()
    nodes = captured.graph_module.graph.find_nodes(op="placeholder")
    names = dict(zip(nodes, captured.input_names, strict=True))
    taken = [
        f"dimension {x.dim} of {names[x.node]} ({x.length:,} long"
        + "".join(f"; dimension {dim} of {names[n]} would do as well" for n, dim in x.others)
        + ")"
        for x in inputs
    ]
    told = f"no attention was found, so tokens are taken to be {' and '.join(taken)}"
    if is_given:
        told = f"tokens are, as was given, {' and '.join(taken)}"
    if world_size > 1:
        values = list(computed(captured, placement))
        whole = sum(x.bytes for x in values)
        split = sum(x.bytes for x in values if x.is_split)
        told += (
            f"; of {format_bytes(whole)} that the program computes, {format_bytes(split)} are "
            f"split over {world_size} ranks and {format_bytes(whole - split)} are on each"
        )
    regions = [
        f"{x.name or 'top level'} ({x.source}): not split as attention: {x.reason}"
        for x in declined
    ]
    return noted((told, *regions), NoteKind.NO_ATTENTION)
