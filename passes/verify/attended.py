"""Which attentions of the rewritten program are split, read off the program itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from ringfx.errors import VerificationError
from ringfx.ir.values import Captured, Sites
from ringfx.passes.rewrite import LocalProgram
from ringfx.passes.token_axes import TokenDim

__all__ = ["split_along"]


def split_along(captured: Captured, sites: Sites, local: LocalProgram) -> Mapping[str, TokenDim]:
    """Where the queries of each attention that is split have their tokens; others are replicated.

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
        if not call.kwargs.get("group"):
            continue
        queries, given = nodes[site.node].args[0], call.args[0]
        assert isinstance(queries, Node)
        assert isinstance(given, Node)
        tokens = local.placement.lines.token_dim(queries)
        line = (
            None if not isinstance(tokens, TokenDim) else local.placement.lines.lines[tokens.line]
        )
        held = int(given.meta["val"].shape[2])
        if (
            line is None
            or not isinstance(tokens, TokenDim)
            or held != line.layout.local_length * tokens.inner
        ):
            raise VerificationError(
                f"{site.name} ({site.source}): attention over several ranks is given {held:,} of "
                f"{site.q_len:,} queries, which are not this rank's shard. This is a defect of "
                "ringfx; please report it with the model."
            )
        found[site.node] = tokens
    return found
