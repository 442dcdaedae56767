"""Why an attention is replicated, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.fx import Node

from ringfx.passes.place.min_cut import PlacementMap
from ringfx.passes.token_axes.token_line import Lines, NotShardable, TokenDim

__all__ = ["why_replicated"]

OPERANDS = ("queries", "keys", "values")


def why_replicated(placement: PlacementMap, node: Node) -> str | None:
    """The reason for which every rank computes all of an attention; None where it is split.

    Attention that can be split is: it is replicated only where its operands hold tokens in a way
    that cannot be sharded.
    """
    if node in placement.modes:
        return None
    found = list(_replicated_operands(placement.lines, node))
    otherwise = placement.reasons.get(node, "none of its operands has a token axis")
    return "; ".join(found) or otherwise


def _replicated_operands(lines: Lines, node: Node) -> Iterator[str]:
    operands = [n for n in node.args[:3] if isinstance(n, Node)]
    alike: dict[str, list[str]] = {}
    for name, value in zip(OPERANDS, operands, strict=True):
        reason = _why_not_sharded(lines, value)
        if reason:
            alike.setdefault(reason, []).append(name)
    for reason, names in alike.items():
        yield f"its {_listed(names)} {reason}"


def _why_not_sharded(lines: Lines, value: Node) -> str:
    tokens = lines.token_dim(value)
    shape = tuple(int(s) for s in value.meta["val"].shape)
    if isinstance(tokens, NotShardable):
        dims = lines.dims_with_tokens(value)
        if len(dims) > 1:
            sizes = " and ".join(f"{shape[d]:,} (dimension {d})" for d in dims)
            return (
                f"{list(shape)} have two token axes, {sizes}. A value is sharded along one; values "
                "that are sharded along the other would have to be resharded first"
            )
        return f"{list(shape)} have the token axis regrouped, so that no run of tokens is together"
    if tokens is None and shape[2] > 1:
        return f"{list(shape)} have no token axis that is sharded"
    if isinstance(tokens, TokenDim) and tokens.dim != 2:
        return (
            f"{list(shape)} have the sharded axis ({tokens.member.length:,} long) as a batch "
            f"(dimension {tokens.dim}), and attention is split along the tokens that it runs over"
        )
    return ""


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
