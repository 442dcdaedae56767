"""Walk the program once and ask about each call: an entry point, or the heart of a softmax?"""

from __future__ import annotations

from torch.fx import Node

from ringfx.ir.values import Captured
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES
from ringfx.passes.detect.added_slices import add_slices
from ringfx.passes.detect.candidate import Candidate, Detected, NearMiss, decline
from ringfx.passes.detect.channels import CHANNELS, write_out
from ringfx.passes.detect.combined import distribute
from ringfx.passes.detect.eager import find_eager
from ringfx.passes.detect.entry_points import ENTRY_POINTS, other_form
from ringfx.passes.detect.inline_kernel_calls import inline_kernel_calls
from ringfx.passes.detect.logsumexps import part_logsumexps
from ringfx.passes.detect.pairs import contract_in_pairs
from ringfx.passes.detect.program import Program
from ringfx.passes.detect.softmax import merge_exponentials
from ringfx.passes.detect.written_calls import written_calls

__all__ = ["detect"]


def detect(captured: Captured, rules: AxisRules = RULES) -> Detected:
    """Every attention of the program.

    Guarantee: each entry-point call of the program is either a candidate or declined, and so is
    each softmax over products of queries with keys that is multiplied with values.
    """
    graph = captured.graph_module.graph
    written = written_calls(graph)
    merge_exponentials(graph)
    contract_in_pairs(graph)
    add_slices(graph)
    distribute(graph)
    refused = inline_kernel_calls(graph, other_form)
    part_logsumexps(graph, _parameters(captured))
    program = Program(graph, _parameters(captured), rules)
    asked = {node: _ask(node, program) for node in graph.nodes}
    if write_out([node for node, answer in asked.items() if _is_over_channels(answer)]):
        program = Program(graph, _parameters(captured), rules)
        asked = {node: _ask(node, program) for node in graph.nodes}
    candidates = [x for x in asked.values() if isinstance(x, Candidate)]
    declined = [decline(node, reason) for node, reason in refused.items()]
    declined += [decline(n, x.reason) for n, x in asked.items() if isinstance(x, NearMiss)]
    declined += [decline(c.node, CHANNELS) for c in candidates if c.over_channels]
    candidates = [c for c in candidates if not c.over_channels]
    if written or not all(candidate.in_windows for candidate in candidates):
        declined += [decline(c.node, WINDOWS) for c in candidates if c.in_windows]
        candidates = [c for c in candidates if not c.in_windows]
    return Detected(candidates=tuple(candidates), declined=tuple(declined), written=written)


WINDOWS = "its batch is cut from the tokens (windows): each window attends alone"
"""Beside other attention, such calls are split as they stand, along with its tokens."""


def _is_over_channels(answer: Candidate | NearMiss | None) -> bool:
    return isinstance(answer, Candidate) and answer.over_channels


def _ask(node: Node, program: Program) -> Candidate | NearMiss | None:
    read = ENTRY_POINTS.get(node.target)
    answer = read(node, program) if read is not None else find_eager(node, program)
    if isinstance(answer, Candidate) and 0 in answer.shape(answer.q[0])[:-2]:
        return NearMiss(EMPTY)
    return answer


EMPTY = "it has no heads, and computes nothing"


def _parameters(captured: Captured) -> frozenset[Node]:
    inputs = captured.graph_module.graph.find_nodes(op="placeholder")
    return frozenset(n for n, p in zip(inputs, captured.is_parameter, strict=True) if p)
