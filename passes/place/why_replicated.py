"""Why an attention runs whole on every rank, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.fx import Node

from ringfx.passes.place.min_cut import Placement
from ringfx.passes.token_axes.token_line import Carried, Lines, Tangle

__all__ = ["why_whole"]

OPERANDS = ("queries", "keys", "values")


def why_whole(placement: Placement, node: Node) -> str | None:
    """The reason for which an attention call is not split; None where it is.

    Attention that can be split is: only where its operands carry tokens in a way that has no split
    form does it run whole.
    """
    if node in placement.modes:
        return None
    found = list(_whole_operands(placement.lines, node))
    said = placement.reasons.get(node, "none of its operands carries a token axis")
    return "; ".join(found) or said


def _whole_operands(lines: Lines, node: Node) -> Iterator[str]:
    operands = [n for n in node.args[:3] if isinstance(n, Node)]
    alike: dict[str, list[str]] = {}
    for name, value in zip(OPERANDS, operands, strict=True):
        reason = _why_not_split(lines, value)
        if reason:
            alike.setdefault(reason, []).append(name)
    for reason, names in alike.items():
        yield f"its {_listed(names)} {reason}"


def _why_not_split(lines: Lines, value: Node) -> str:
    carried = lines.carried(value)
    shape = tuple(int(s) for s in value.meta["val"].shape)
    if carried is Tangle.TANGLED:
        dims = lines.token_dims(value)
        if len(dims) > 1:
            sizes = " and ".join(f"{shape[d]:,} (dimension {d})" for d in dims)
            return (
                f"{list(shape)} hold two token axes, {sizes}, and a value is split along one: what "
                "is split along the other would have to be exchanged before it"
            )
        return f"{list(shape)} hold the token axis in pieces that no run of tokens is"
    if carried is None and shape[2] > 1:
        return f"{list(shape)} carry no token axis that is split"
    if isinstance(carried, Carried) and carried.dim != 2:
        return (
            f"{list(shape)} carry the split axis ({carried.member.length:,} long) as a batch "
            f"(dimension {carried.dim}), and attention is split along the tokens that it runs over"
        )
    return ""


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
