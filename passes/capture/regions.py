"""Regions under torch.func transforms (vmap, grad) as calls of plain batched programs.

Between ``_vmap_increment_nesting`` and ``_vmap_decrement_nesting`` values are batched tensors,
which a flat program cannot hold. ``fold_regions`` makes each such stretch a submodule;
``flatten_region`` traces one below autograd, where vmap has already become broadcasting. The
operators that remain are differentiable themselves, so gradients are those of the region.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from ringfx.errors import CaptureRefused
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.capture.precision import AutocastInterpreter
from ringfx.torch_compat.autograd import SET_GRAD_ENABLED
from ringfx.torch_compat.releases import transforms_run

__all__ = ["REGION", "flatten_region", "fold_regions", "trace_below_autograd"]

REGION = "ringfx_region"
"""Name of the submodules that hold a region."""
_ENTER = ("_vmap_increment_nesting", "_grad_increment_nesting", "_jvp_increment_nesting")
_LEAVE = ("_vmap_decrement_nesting", "_grad_decrement_nesting", "_jvp_decrement_nesting")
_AROUND = (
    "lazy_load_decompositions",
    "_saved_tensors_hooks_disable",
    "_saved_tensors_hooks_enable",
)


def fold_regions(gm: GraphModule) -> None:
    """Replace each outermost transformed region, here and in the bodies below, by one call."""
    for module in [m for m in gm.modules() if isinstance(m, GraphModule)]:
        length = len(module.graph.nodes)
        for region in _regions(module.graph):
            _fold(module, region)
        if len(module.graph.nodes) != length:  # since 2.13 torch recompiles all bodies below too
            module.recompile()


def flatten_region(region: GraphModule, operands: Sequence[Any]) -> GraphModule:
    """The region as plain operators on whole batches, for these (fake) operands."""
    return trace_below_autograd(AutocastInterpreter(region).run, operands)


def trace_below_autograd(function: Callable[..., Any], operands: Sequence[Any]) -> GraphModule:
    """A program of what runs once transforms have been resolved, without touching the tracing
    that is under way."""
    given = [v.detach() if isinstance(v, torch.Tensor) else v for v in operands]
    with disable_proxy_modes_tracing(), fx_traceback.preserve_node_meta(), transforms_run():
        made = make_fx(function)(*given)
    for node in list(made.graph.nodes):  # a batched number is traced as a copy of that number
        if node.target is torch.ops.aten._to_copy.default and not isinstance(node.args[0], Node):
            node.replace_all_uses_with(node.args[0])
            made.graph.erase_node(node)
    return made


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _regions(graph: Graph) -> list[list[Node]]:
    regions: list[list[Node]] = []
    depth = 0
    for node in list(graph.nodes):
        if _name(node) in _AROUND and depth == 0:
            graph.erase_node(node)
            continue
        if _name(node) in _ENTER:
            if depth == 0:
                regions.append([])
            depth += 1
        if depth:
            regions[-1].append(node)
        depth -= _name(node) in _LEAVE
    return regions


def _fold(gm: GraphModule, region: list[Node]) -> None:
    _refuse_gradient_modes(region)
    inside = set(region)
    operands = list(dict.fromkeys(n for x in region for n in x.all_input_nodes if n not in inside))
    results = [n for n in region if any(u not in inside for u in n.users)]
    name = f"{REGION}_{sum(REGION in n for n, _ in gm.named_children())}"
    gm.add_submodule(name, _submodule(gm, region, operands, results))
    with gm.graph.inserting_before(region[-1].next):
        call = gm.graph.call_module(name, tuple(operands))
        call.meta = _origin(region)
        for i, result in enumerate(results):
            part = gm.graph.call_function(operator.getitem, (call, i))
            part.meta = dict(result.meta)
            result.replace_all_uses_with(part, delete_user_cb=lambda u: u not in inside)
    for node in reversed(region):
        gm.graph.erase_node(node)


def _submodule(
    gm: GraphModule, region: Iterable[Node], operands: Sequence[Node], results: Sequence[Node]
) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for operand in operands:
        copies[operand] = graph.placeholder(operand.name)
        copies[operand].meta = dict(operand.meta)
    for node in region:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[r] for r in results))
    return GraphModule(gm, graph)


def _origin(region: Sequence[Node]) -> dict[str, Any]:
    described = next((n for n in region if n.meta.get("stack_trace")), region[0])
    return {k: v for k, v in described.meta.items() if k in ("stack_trace", "nn_module_stack")}


def _refuse_gradient_modes(region: Sequence[Node]) -> None:
    """Below autograd a region without gradients looks like one with gradients."""
    modes = [n.args[0] for n in region if n.target is SET_GRAD_ENABLED]
    if True in modes and False in modes[modes.index(True) :]:
        modes = modes[: modes.index(True)]  # torch.func.grad turns gradients on, and back
    if False in modes:
        raise CaptureRefused(
            f"{describe_node(region[0])}: the program contains a torch.func transform with "
            "torch.no_grad() inside. Do: move torch.no_grad() out of the transformed function."
        )
