"""Decompose flex_attention: its score and mask functions become ordinary operators.

    flex(q, k, v) = softmax(where(keep(b, h, i, j), score_mod(q k^T scale, b, h, i, j), -inf)) v

No kernel is needed, because nothing here is run: every S x S value exists only as a fake tensor
until mask recovery has turned it into a function of positions. The block mask is a summary of
``keep`` for a kernel's use, so what builds it is dropped before it is traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from ringfx.errors import CaptureRefused
from ringfx.passes.capture.origin import describe_node
from ringfx.passes.capture.regions import trace_below_autograd
from ringfx.torch_compat.flex import (
    LARGE_BLOCK_SIZE,
    TransformGetItemToIndex,
    mapped_over_positions,
    safe_softmax,
)
from ringfx.torch_compat.graphs import is_erased

__all__ = ["drop_block_masks", "flex_attention"]

aten = torch.ops.aten
Tensor = torch.Tensor
HOP = torch.ops.higher_order.flex_attention
_BLOCK_MASK = 4
"""Position of the block mask among the operator's arguments."""


def drop_block_masks(gm: GraphModule) -> None:
    """Take block masks out of every call, and what only they needed out of the graph.

    Raises
    ------
    CaptureRefused
        For a block mask without a mask function: its blocks alone say what is kept.
    """
    for module in [m for m in gm.modules() if isinstance(m, GraphModule)]:
        calls = [node for node in module.graph.nodes if node.target is HOP]
        for node in calls:
            _drop(module, node)
        if calls:
            module.recompile()


def _drop(gm: GraphModule, call: Node) -> None:
    block_mask = cast("tuple[Any, ...]", call.args[_BLOCK_MASK])
    *rest, block_q, _, keep = block_mask
    if block_q != LARGE_BLOCK_SIZE and _is_noop(getattr(gm, str(keep.target))):
        raise CaptureRefused(
            f"{describe_node(call)}: flex_attention is given a BlockMask whose mask_mod keeps "
            "every pair, so that only its blocks say what is masked. Do: make it with "
            "create_block_mask, or pass a mask_mod to from_kv_blocks."
        )
    unread = [x for x in rest if isinstance(x, Node)]
    kept = tuple(None if isinstance(x, Node) else x for x in rest)
    call.update_arg(_BLOCK_MASK, (*kept, *block_mask[-3:]))
    _erase_unread(gm, unread)


def _is_noop(keep: GraphModule) -> bool:
    result = keep.graph.output_node().args[0]
    return isinstance(result, Node) and result.target == "new_ones"


def _erase_unread(gm: GraphModule, values: Sequence[Node]) -> None:
    """Erase what was made for these alone; regions are single calls here."""
    stack = list(values)
    while stack:
        node = stack.pop()
        if node.users or node.op in ("placeholder", "get_attr") or is_erased(node):
            continue
        operands = list(node.all_input_nodes)
        gm.graph.erase_node(node)
        stack += operands


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, score_mod: GraphModule, block_mask: tuple[Any, ...],
    scale: float, options: dict[str, Any], score_inputs: tuple[Any, ...] = (),
    mask_inputs: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the operator of this name computes: out, and the statistics where they are asked for."""
    places = [torch.arange(n, device=q.device) for n in (*q.shape[:3], k.shape[2])]
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (*q.shape[:3], k.shape[2])
    keep: Tensor | None = None
    if not _is_noop(block_mask[-1]):
        keep = _mapped(block_mask[-1], (), places, mask_inputs)
    score = _flat(score_mod, (q.new_empty(shape, dtype=precision),), places, score_inputs)
    bias = _added(score)
    wants_stats = options.get("OUTPUT_LOGSUMEXP") or options.get("OUTPUT_MAX")
    if bias is not None and not wants_stats:
        added = None
        if isinstance(bias, GraphModule):
            added = Interpreter(bias).run(None, *places, *score_inputs)
        return _dot_product(q, k, v, keep, added, scale), q.new_empty(0), q.new_empty(0)
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
    scores = (q.to(precision) @ wide_k.to(precision).transpose(-2, -1)) * scale
    scores = Interpreter(score).run(scores, *places, *score_inputs)
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    weights = safe_softmax(scores, -1) if keep is not None else scores.softmax(-1)
    out = weights.to(q.dtype) @ wide_v.to(q.dtype)
    ln2 = math.log(2.0)  # the operator counts in powers of two
    return out, scores.logsumexp(-1) / ln2, scores.amax(-1) / ln2


def _dot_product(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:
    mask = keep
    if bias is not None:
        mask = bias if keep is None else bias.masked_fill(~keep, -math.inf)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)


def _mapped(
    function: GraphModule, first: tuple[Tensor, ...], places: list[Tensor], inputs: tuple[Any, ...]
) -> Tensor:
    result: Tensor = Interpreter(_flat(function, first, places, inputs)).run(
        *first, *places, *inputs
    )
    return result


def _flat(
    function: GraphModule, first: tuple[Tensor, ...], places: list[Tensor], inputs: tuple[Any, ...]
) -> GraphModule:
    """The function over all of batch, heads, queries and keys, as plain operators."""
    over = mapped_over_positions(
        cast(Callable[..., Any], Interpreter(function).run),
        prefix=(0,) * len(first),
        suffix=(None,) * len(inputs),
    )
    with TransformGetItemToIndex():
        return trace_below_autograd(over, (*first, *places, *inputs))


def _added(score: GraphModule) -> GraphModule | bool | None:
    """What is added to the score: a program for it, True for nothing, None if more is done.

    Only ``score`` itself and ``score + bias`` are read so; anything else is decomposed.
    """
    first = next(n for n in score.graph.nodes if n.op == "placeholder")
    result: Any = score.graph.output_node().args[0]
    if result is first:
        return True
    if result.target not in (aten.add.Tensor, aten.sub.Tensor) or len(first.users) != 1:
        return None
    left, right = result.args[:2]
    if left is first and isinstance(right, Node):
        other = right
    elif right is first and isinstance(left, Node) and result.target is aten.add.Tensor:
        other = left
    else:
        return None
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    graph.graph_copy(score.graph, copies)
    graph.erase_node(copies[result])
    bias = copies[other]
    if result.target is aten.sub.Tensor:
        bias = graph.call_function(aten.neg.default, (bias,))
    graph.output(graph.call_function(aten.expand.default, (bias, list(first.meta["val"].shape))))
    return GraphModule(score, graph)
