"""Which attentions of the rewritten program are split, read off the program itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from ringfx.errors import VerificationError
from ringfx.ir.values import Captured, Sites
from ringfx.passes.rewrite import LocalProgram
from ringfx.passes.token_axes import Carried

__all__ = ["split_along"]


def split_along(captured: Captured, sites: Sites, local: LocalProgram) -> Mapping[str, Carried]:
    """How each attention that ranks share carries its queries' tokens; the others run whole.

    Called after ``verify``, which has run the program on fake tensors.

    Raises
    ------
    VerificationError
        Where an attention is given a group of ranks and not this rank's part of the tokens.
    """
    nodes = {n.name: n for n in captured.graph_module.graph.nodes}
    found: dict[str, Carried] = {}
    for site in sites.found:
        call = local.attentions[site.node]
        if not call.kwargs.get("group"):
            continue
        queries, given = nodes[site.node].args[0], call.args[0]
        assert isinstance(queries, Node)
        assert isinstance(given, Node)
        carried = local.placement.lines.carried(queries)
        line = (
            None if not isinstance(carried, Carried) else local.placement.lines.lines[carried.line]
        )
        held = int(given.meta["val"].shape[2])
        if (
            line is None
            or not isinstance(carried, Carried)
            or held != line.layout.local_length * carried.inner
        ):
            raise VerificationError(
                f"{site.name} ({site.source}): attention over several ranks is given {held:,} of "
                f"{site.q_len:,} queries, which are not this rank's shard. This is a defect of "
                "ringfx; please report it with the model."
            )
        found[site.node] = carried
    return found
