"""Which attentions of the rewritten program are split, read off the program itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Graph, Node

from ringfx.errors import DEFECT, VerificationError
from ringfx.ir.values import Captured, Sites
from ringfx.passes.place import PlacementMap
from ringfx.passes.rewrite import LocalProgram
from ringfx.passes.split_modes.attention import OwnKeys
from ringfx.passes.token_axes import TokenDim

__all__ = ["few_queries", "split_along"]


def few_queries(graph: Graph, placement: PlacementMap, sites: Sites) -> frozenset[int]:
    """The attentions (by their number) of which every rank has all queries and its own keys."""
    nodes = {n.name: n for n in graph.nodes}
    modes = (placement.modes.get(nodes[site.node]) for site in sites.found)
    return frozenset(i for i, mode in enumerate(modes) if isinstance(mode, OwnKeys))


def split_along(captured: Captured, sites: Sites, local: LocalProgram) -> Mapping[str, TokenDim]:
    """Where each attention that is split has what ranks share: its queries; of few queries its
    keys; of a local one its batch. Others are replicated.

    Called after ``verify``, which has run the program on fake tensors.

    Raises
    ------
    VerificationError
        Where an attention is given a group of ranks and not this rank's part of the tokens.
    """
    nodes = {n.name: n for n in captured.graph_module.graph.nodes}
    found: dict[str, TokenDim] = {}
    for site in sites.found:
        call = local.attentions[site.node]
        if not (call.kwargs.get("group") or site.is_local):
            continue
        few = isinstance(local.placement.modes.get(nodes[site.node]), OwnKeys)
        shared = "entries" if site.is_local else "keys" if few else "queries"
        split, given = (n.args[1 if few else 0] for n in (nodes[site.node], call))
        assert isinstance(split, Node)
        assert isinstance(given, Node)
        tokens = local.placement.lines.token_dim(split)
        line = (
            None if not isinstance(tokens, TokenDim) else local.placement.lines.lines[tokens.line]
        )
        dim = tokens.dim if isinstance(tokens, TokenDim) and site.is_local else 2
        held = int(given.meta["val"].shape[dim])
        if (
            line is None
            or not isinstance(tokens, TokenDim)
            or held != tokens.outer * line.layout.local_length * tokens.inner
        ):
            whole = split.meta["val"].shape[dim]
            raise VerificationError(
                f"{site.name} ({site.source}): attention over several ranks is given {held:,} of "
                f"{whole:,} {shared}, which are not this rank's shard. {DEFECT}"
            )
        found[site.node] = tokens
    return found
