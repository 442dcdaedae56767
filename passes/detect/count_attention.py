"""How many attentions a program still holds, counted without detection.

Detection asks whether a region *is* attention. This counts what *looks like* it, by plain
reachability: a product of two activations, then (past no other product) a softmax, or an
exponential and a sum, then (past no other product) another product of activations. Calls whose
name says attention count too. What is left after detection has rewritten what it found must be
explained by a near miss; anything else was missed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ringfx.errors import AttentionMissed
from ringfx.ir.values import Captured, Declined, Sites
from ringfx.ops.operator import attention
from ringfx.passes.detect.candidate import decline
from ringfx.torch_compat.operators import HigherOrderOperator, OpOverload, schema_of
from ringfx.units.argument import Argument

__all__ = ["LooksLike", "find_attention_like", "missed", "refuse_missed"]

aten = torch.ops.aten

PRODUCTS = frozenset({
    "matmul", "mm", "bmm", "baddbmm", "addmm", "addbmm", "linear", "einsum", "tensordot", "inner",
    "_grouped_mm", "convolution", "conv1d", "conv2d", "conv3d",
})  # fmt: skip
"""Operators that contract: a softmax reads the product that is nearest above it."""
SOFTMAXES = frozenset({"softmax", "_softmax", "_safe_softmax", "_masked_softmax"})
EXPONENTIALS = frozenset({"exp", "exp2", "pow"})
"""Half a softmax: the other half is a sum of them."""
SUMS = frozenset({"sum", "logsumexp"})
BY_NAME = re.compile(r"scaled_dot_product|flash_attention|efficient_attention|cudnn_attention|"
                     r"flash_attn|multi_head_attention|flex_attention|fmha")  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class LooksLike:
    """Something that resembles attention, and every node that takes part in it."""

    node: Node
    region: frozenset[Node]


def missed(captured: Captured, sites: Sites) -> tuple[tuple[Declined, ...], int]:
    """What detection neither found nor explained, and how many attentions there are in all.

    Called on the rewritten program: what was found is canonical there and no longer counted.
    """
    explained = {near.node for near in sites.declined}
    left = find_attention_like(captured)
    unexplained = [x for x in left if not any(n.name in explained for n in x.region)]
    reason = "it looks like attention (two products around an exponential) but was not recognised"
    return tuple(decline(x.node, reason) for x in unexplained), len(sites.found) + len(left)


def refuse_missed(overlooked: Sequence[Declined]) -> None:
    """Strict mode.

    Raises
    ------
    AttentionMissed
        Names every place.
    """
    if not overlooked:
        return
    places = "\n".join(f"  {x.name or 'top level'} ({x.source}), {x.node}" for x in overlooked)
    raise AttentionMissed(
        f"{len(overlooked)} of the program's attentions were not recognised and would be "
        "replicated on every rank:\n"
        f"{places}\n"
        "Do: call torch.nn.functional.scaled_dot_product_attention there, or leave "
        f"{Argument('strict')} out; "
        "`ringfx explain` lists every attention that was found and every rejected one."
    )


def find_attention_like(captured: Captured) -> tuple[LooksLike, ...]:
    """Everything in the program that looks like attention, in program order."""
    graph = captured.graph_module.graph
    activations = _activations(captured)
    counted: dict[frozenset[Node], LooksLike] = {}
    for node in graph.nodes:
        found = _by_name(node) or _around(node, activations)
        if found is not None:
            key = frozenset(n for n in found.region if _is_product(n)) or found.region
            counted.setdefault(key, found)
    return tuple(counted.values())


def _activations(captured: Captured) -> set[Node]:
    """Values that depend on an input of the call and not on parameters alone."""
    found: set[Node] = set()
    given = iter(captured.is_parameter)
    for node in captured.graph_module.graph.nodes:
        if node.op == "placeholder":
            if not next(given):
                found.add(node)
        elif any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _by_name(node: Node) -> LooksLike | None:
    if node.op != "call_function" or node.target is attention:
        return None
    return LooksLike(node=node, region=frozenset({node})) if BY_NAME.search(_name(node)) else None


def _around(node: Node, activations: set[Node]) -> LooksLike | None:
    """A softmax, or an exponential and a sum, between two products of activations."""
    known = _name(node) in SOFTMAXES | EXPONENTIALS
    if not known or node not in activations or not _is_matrix(node):
        return None
    if _name(node) == "pow" and isinstance(node.args[0], Node):
        return None  # x ** 2: only a number to a power is an exponential
    above = _reach(node, lambda n: iter(n.all_input_nodes), activations)
    if not any(_is_product(n) and _of_activations(n, activations) for n in above):
        return None
    below = _reach(node, lambda n: iter(n.users), activations)
    if not any(_is_product(n) and _of_activations(n, activations) for n in below):
        return None
    if _name(node) in EXPONENTIALS and not any(_name(n) in SUMS for n in above | below):
        return None
    return LooksLike(node=node, region=frozenset({node, *above, *below}))


def _reach(
    start: Node, step: Callable[[Node], Iterator[Node]], activations: set[Node]
) -> set[Node]:
    """Activations that are reached past no product; the products that end a path are included."""
    found: set[Node] = set()
    stack = list(step(start))
    while stack:
        node = stack.pop()
        if node in found or node not in activations or node.target is attention:
            continue
        found.add(node)
        if not _is_product(node) and not _by_name(node):
            stack.extend(step(node))
    return found


def _is_product(node: Node) -> bool:
    return node.op == "call_function" and _name(node) in PRODUCTS


def _of_activations(node: Node, activations: set[Node]) -> bool:
    """Whether both factors of a product depend on the call's inputs."""
    factors = [n for n in node.all_input_nodes if n in activations]
    return len(factors) >= 2


def _is_matrix(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() >= 2


def _name(node: Node) -> str:
    target = node.target
    if isinstance(target, OpOverload):
        return str(schema_of(target).name).split("::")[1]
    if isinstance(target, HigherOrderOperator):
        return str(target.name())
    return ""
