"""Which values of a program are kept for its backward, and what is alive when.

A backward needs some values of the forward: both operands of a product, the output of an
exponential. Each is either kept, or computed again from kept ones by cheap operators; what is kept
is the cheapest set that cuts every way from an expensive result to a needed value: a minimum vertex
cut, as torch's own partitioner for ``aot_eager`` and ``inductor`` makes.

What the user checkpointed (``torch.utils.checkpoint``) is not kept, results of attention apart:
when the backward reaches such a region, it runs again, and what it needs is alive until then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx
import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from ringfx.cost_model.prediction.products import op_name
from ringfx.passes.chunks.outline import ChunkedCall
from ringfx.torch_compat.operators import OpOverload, schema_of

__all__ = [
    "Values", "block_of", "chunked_call", "is_expensive", "kept_values", "needed_by",
    "outputs_of", "values_of",
]  # fmt: skip

# fmt: off
EXPENSIVE = frozenset([
    "linear", "mm", "bmm", "addmm", "baddbmm", "matmul", "einsum", "grouped_mm", "_grouped_mm",
    "convolution", "transposed_convolution", "conv1d", "conv2d", "attention",
    "scaled_dot_product_attention", "embedding", "cross_entropy_loss", "nll_loss", "sort", "topk",
    "cumsum", "index_put", "scatter",
    "dropout", "native_dropout", "bernoulli", "rand", "rand_like", "randint", "region_in_chunks",
])
"""Operators that are not run twice: products, lookups, orders, draws."""

NEEDS_OUTPUT = frozenset([
    "softmax", "_softmax", "log_softmax", "tanh", "sigmoid", "rsqrt", "sqrt", "exp", "relu",
])
NEEDS_NOTHING = frozenset([
    "add", "sub", "rsub", "neg", "sum", "mean", "cat", "stack", "pad", "constant_pad_nd", "to",
    "_to_copy", "clone", "contiguous", "copy", "detach", "embedding", "index_select", "cumsum",
    "slice_scatter", "arange", "zeros", "ones", "full", "new_zeros", "eq", "ne", "le", "lt", "ge",
    "gt", "logical_and", "logical_or", "logical_not", "bitwise_and",
])
NEEDS_OPERANDS = frozenset([
    "mul", "div", "linear", "mm", "bmm", "addmm", "baddbmm", "matmul", "einsum",
])
"""Each operand, if another one has a gradient. What no set names needs all its inputs."""
# fmt: on

PARTS = frozenset(["chunk", "split", "split_with_sizes", "tensor_split", "unbind"])
"""Lists of views; their items are views of the same memory."""

KEEPS_ITS_OWN = frozenset(["cross_entropy_loss"])
"""Keeps an array of its own as large as its input, the log-probabilities, and not its input."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Values:
    """The tensors of a program that have memory of their own, in program order."""

    nodes: tuple[Node, ...]
    """All nodes of the graph, by position."""
    owner: Mapping[Node, Node]
    """For a view the value whose memory it shows; itself for all others."""
    bytes: Mapping[Node, int]
    """Of one rank; 0 for views and for inputs, which are counted apart."""
    has_grad: frozenset[Node]
    region: Mapping[Node, int]
    """The checkpointed region that a node is run again with; nodes of none are missing."""
    around: Mapping[Node, int] = field(default_factory=dict)
    """For attentions the region around them, which they are not run again with."""
    once: frozenset[Node] = frozenset()
    """Values that regions hand on: they are never run again."""
    taken: frozenset[Node] = frozenset()
    """Whole masks and biases of which attention keeps its own queries' rows."""

    def hidden(self, node: Node) -> Collection[Node]:
        """What an operator keeps for its backward and is no value of the program: as large as
        these."""
        if node not in self.has_grad or op_name(node) not in KEEPS_ITS_OWN:
            return ()
        owners = {self.owner[n] for n in node.all_input_nodes if n in self.has_grad}
        return {x for x in owners if self.bytes[x]}

    def operands(self, node: Node) -> Collection[Node]:
        """What a node reads, each once: values that have memory."""
        return dict.fromkeys(self.owner[i] for i in node.all_input_nodes)

    @cached_property
    def readers(self) -> Mapping[Node, Sequence[Node]]:
        """Calls that read a value or a view of it; the program's end is one, and attention."""
        found: dict[Node, list[Node]] = {}
        for node in self.nodes:
            if self.owner[node] is node:
                for source in self.operands(node):
                    found.setdefault(source, []).append(node)
        return found

    @cached_property
    def level(self) -> Mapping[Node, int]:
        """The most expensive operators on one way to a node, itself apart."""
        found: dict[Node, int] = {}
        for node in self.nodes:
            before = (found[i] + is_expensive(i) for i in node.all_input_nodes)
            found[node] = max(before, default=0)
        return found


def is_expensive(node: Node) -> bool:
    """Whether it is a call that is not run twice."""
    return node.op == "call_function" and op_name(node) in EXPENSIVE


def chunked_call(node: Node) -> ChunkedCall | None:
    """What a region in chunks holds; None for any other call."""
    found: ChunkedCall | None = node.meta.get("ringfx_chunked")
    return found


def block_of(node: Node) -> str:
    """The block of the model that it is in: its path up to the first number, or all of it."""
    path: str = node.meta.get("ringfx_path", "")
    match = re.match(r".*?\.\d+(?=\.|$)", path)
    return match[0] if match else path


def values_of(
    graph: Graph, size: Callable[[Node], int], input_has_grad: Mapping[Node, bool]
) -> Values:
    """Memory, views and gradients of all nodes.

    Parameters
    ----------
    size
        Bytes of a node's tensor on one rank.
    input_has_grad
        For each placeholder whether a gradient is wanted for it.
    """
    nodes = tuple(graph.nodes)
    owner: dict[Node, Node] = {}
    sizes: dict[Node, int] = {}
    has_grad: set[Node] = set()
    grad_enabled = True
    for node in nodes:
        if op_name(node) == "_set_grad_enabled":
            grad_enabled = bool(node.args[0])
        source = _viewed(node)
        if op_name(node) == "getitem" and owner[node.all_input_nodes[0]] is not node.args[0]:
            source = node.all_input_nodes[0]
        owner[node] = owner[source] if source is not None else node
        is_value = node.op == "call_function" and source is None and _tensor(node) is not None
        sizes[node] = size(node) if is_value else 0
        if (node.op == "placeholder" and input_has_grad.get(node, False)) or (
            grad_enabled and _is_float(node) and has_grad.intersection(node.all_input_nodes)
        ):
            has_grad.add(node)
    return Values(
        nodes=nodes,
        owner=owner,
        bytes=sizes,
        has_grad=frozenset(has_grad),
        region={node: region for node in nodes if (region := _region(node))},
        once=frozenset(n for n in nodes if _checkpoint(n)),
        around={n: n.meta.get("ac_graph_id", 0) for n in nodes if op_name(n) == "attention"},
    )


def _region(node: Node) -> int:
    """What one region hands to a later one is kept, as torch's partitioner keeps it, and so is what
    attention gives: ``passes.rewrite`` sends no message twice."""
    region = 0 if op_name(node) == "attention" else _checkpoint(node)
    return 0 if any(_checkpoint(user) > region for user in node.users) else region


def _checkpoint(node: Node) -> int:
    if node.meta.get("recompute") is not CheckpointPolicy.PREFER_RECOMPUTE:
        return 0
    region: int = node.meta.get("ac_graph_id", 0)
    return region


def _tensor(node: Node) -> torch.Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def _is_float(node: Node) -> bool:
    """Whether it is a tensor of floats, or several values among which there is one."""
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(x, torch.Tensor) and x.dtype.is_floating_point for x in parts)


def _viewed(node: Node) -> Node | None:
    """The input that a view shows, or that a conversion to the same dtype returns."""
    value, inputs = _tensor(node), node.all_input_nodes
    name = op_name(node)
    if name in PARTS and node.op == "call_function":
        return inputs[0]
    if node.op != "call_function" or value is None or not inputs:
        return None
    source = _tensor(inputs[0])
    if name in ("to", "_to_copy") and source is not None and source.dtype == value.dtype:
        return inputs[0]
    if name in ("reshape", "contiguous", "flatten"):
        is_plain = source is not None and source.is_contiguous()
        return inputs[0] if is_plain else None
    target = node.target
    if not isinstance(target, OpOverload):
        return None
    returns = schema_of(target).returns
    return inputs[0] if returns and returns[0].alias_info is not None else None


def outputs_of(values: Values) -> frozenset[Node]:
    """What the program hands to its caller, who holds it until after the backward."""
    return frozenset(values.owner[n] for n in values.nodes[-1].all_input_nodes)


# --- what is kept -----------------------------------------------------------------------------


def needed_by(node: Node, values: Values) -> Iterable[Node]:
    """Values whose memory the backward of one operator reads."""
    if node not in values.has_grad or node.op != "call_function":
        return ()
    if values.owner[node] is not node:
        return ()
    name = op_name(node)
    inputs = [n for n in node.all_input_nodes if _tensor(n) is not None]
    if (chunked := chunked_call(node)) is not None and chunked.is_loss:
        return ()
    if name in NEEDS_NOTHING:
        needed: Sequence[Node] = ()
    elif name in NEEDS_OUTPUT:
        needed = (node,)
    elif name == "attention":
        needed = (*inputs, node)
    elif name in KEEPS_ITS_OWN:
        needed = [n for n in inputs if not _is_float(n)]
    elif name in NEEDS_OPERANDS:
        needed = [n for n in inputs if any(o in values.has_grad for o in inputs if o is not n)]
        needed = needed if len(inputs) > 1 else []
    else:
        needed = inputs
    return dict.fromkeys(values.owner[n] for n in needed)


def kept_values(values: Values) -> frozenset[Node]:
    """The cheapest values to keep so that every needed one is kept or can be computed again.

    What an expensive operator's backward reads must lie in memory whole, so it is kept itself;
    only what cheap operators read can be computed again on the way.
    """
    network = nx.DiGraph()
    sizes = values.bytes
    for node in values.nodes:
        if node.op != "call_function" or values.owner[node] is not node or not sizes[node]:
            continue
        network.add_edge((node, "in"), (node, "out"), capacity=sizes[node])
        if node in values.region:
            network.add_edge((node, "in"), "needed")
        elif op_name(node) in EXPENSIVE or node in values.once:
            network.add_edge("expensive", (node, "in"))
            continue
        for source in {values.owner[n] for n in node.all_input_nodes}:
            if sizes[source]:
                network.add_edge((source, "out"), (node, "in"))
    for node in values.nodes:
        for needed in needed_by(node, values):
            if sizes[needed]:
                network.add_edge((needed, "out"), "needed")
                if op_name(node) in EXPENSIVE and needed not in values.region:
                    network.add_edge("expensive", (needed, "in"))
    if "expensive" not in network or "needed" not in network:
        return frozenset()
    _, (reached, _) = nx.minimum_cut(network, "expensive", "needed")
    return frozenset(
        node
        for node in values.nodes
        if (node, "in") in reached and (node, "out") in network and (node, "out") not in reached
    )
