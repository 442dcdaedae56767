"""Walk the program once and ask the table of entry points about each call."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ringfx.passes.detect.entry_points import ENTRY_POINTS, Candidate, Near, other_form
from ringfx.passes.detect.respell import respell
from ringfx.passes.values import Captured, Declined

__all__ = ["Candidate", "Detected", "detect"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Detected:
    """Attention calls in program order, and look-alikes with the reason why not."""

    candidates: tuple[Candidate, ...]
    declined: tuple[Declined, ...]


def detect(captured: Captured) -> Detected:
    """Every attention of the program.

    Guarantee: each entry-point call of the program is either a candidate or declined.
    """
    graph = captured.graph_module.graph
    refused = respell(graph, other_form)
    candidates: list[Candidate] = []
    declined = [decline(node, reason) for node, reason in refused.items()]
    for node in graph.nodes:
        read = ENTRY_POINTS.get(node.target)
        if read is None:
            continue
        answer = read(node)
        if isinstance(answer, Near):
            declined.append(decline(node, answer.reason))
        else:
            candidates.append(answer)
    return Detected(candidates=tuple(candidates), declined=tuple(declined))


def decline(node: Node, reason: str) -> Declined:
    return Declined(
        node=node.name,
        name=node.meta.get("ringfx_path", ""),
        source=node.meta.get("ringfx_source", ""),
        reason=reason,
    )
