"""Small programs on their way through the passes, as text before and after each.

``v3 = select(v2, 0, 0)  f32[1, 2, 6, 2]``: values are numbered, shapes are global until rewrite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn import functional as F

from ringfx.ir.values import Captured, Sites
from ringfx.passes.axes import AxisMap, name_axes
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.capture import capture
from ringfx.passes.detect import detect
from ringfx.passes.masks import recover
from ringfx.passes.normalize import normalize
from ringfx.passes.place import place
from ringfx.passes.rewrite import rewrite
from ringfx.passes.token_axes import Lines, find_lines
from ringfx.strategies.production import PRODUCTION
from tests.support.graph_text import graph_text, names_in, same_text
from tests.support.programs import captured, traced

RANKS = 2


class Layer(nn.Module):
    """One attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12, bias=False)
        self.out = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.loss(self.out(mixed.transpose(1, 2).flatten(2)), target)

    def loss(self, y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(y, target)


class Differences(Layer):
    def loss(self, y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return y.diff(dim=1).sum()


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    """6 tokens."""
    return torch.randn(1, 6, 4), torch.randn(1, 6, 4)


def in_place(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 0] = 1.0
    return F.mse_loss(y.relu_(), target)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    return (q @ k.mT).masked_fill(~causal, float("-inf")).softmax(-1) @ v


def heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    return q, k, v


def found(model: Any, *args: torch.Tensor) -> tuple[Captured, Sites, Graph]:
    program = captured(model, *args)
    return program, recover(program, detect(program)), program.graph_module.graph


def lines_of(graph: Graph, sites: Sites) -> tuple[AxisMap, Lines]:
    axes = name_axes(graph)
    return axes, find_lines(graph, axes, sites.found, RANKS)


def letters(axes: AxisMap) -> Callable[[Node], str]:
    """The axes of each dimension as letters, in the order in which they appear; 1 for none."""
    known: dict[int, str] = {}

    def note(node: Node) -> str:
        if node not in axes.values:
            return ""
        dims = [
            "".join(known.setdefault(axis, chr(ord("a") + len(known))) for axis in dim) or "1"
            for dim in axes.dims(node)
        ]
        return " ".join(dims)

    return note


def test_capture_makes_writes_values_and_a_mean_a_sum_over_a_count() -> None:
    def see(gm: torch.fx.GraphModule, inputs: Any) -> tuple[str, Captured]:
        return graph_text(gm.graph), capture(gm, inputs, known=find_rule)

    before, program = traced(in_place, *operands(), see=see)
    same_text(
        before,
        """
        in0                                                  f32[1, 6, 4]
        in1                                                  f32[1, 6, 4]
        v0 = mul(in0, 2)                                     f32[1, 6, 4]
        v1 = setitem(v0, [slice(None, None, None), 0], 1.0)
        v2 = relu_(v0)                                       f32[1, 6, 4]
        v3 = mse_loss(v2, in1)                               f32[]
        return [v3]
        """,
    )
    same_text(
        graph_text(program.graph_module.graph),
        """
        in0                        f32[1, 6, 4]
        in1                        f32[1, 6, 4]
        v0 = mul(in0, 2)           f32[1, 6, 4]
        v1 = select(v0, 1, 0)      f32[1, 4]
        v2 = full_like(v1, 1.0)    f32[1, 4]
        v3 = unsqueeze(v2, 1)      f32[1, 1, 4]
        v4 = arange(6)             i64[6]
        v5 = eq(v4, 0)             bool[6]
        v6 = reshape(v5, [6, 1])   bool[6, 1]
        v7 = where(v6, v3, v0)     f32[1, 6, 4]
        v8 = relu(v7)              f32[1, 6, 4]
        v9 = mse_loss(v8, in1, 2)  f32[]
        v10 = div(v9, 24)          f32[]
        v11 = to(v10, f32)         f32[]
        return [v11]
        """,
    )


def test_detect_reads_eager_attention_and_masks_make_it_one_call() -> None:
    program = captured(eager, *heads())
    graph = program.graph_module.graph
    same_text(
        graph_text(graph),
        """
        in0                             f32[1, 2, 6, 4]
        in1                             f32[1, 2, 6, 4]
        in2                             f32[1, 2, 6, 4]
        v0 = ones([6, 6], dtype=bool)   bool[6, 6]
        v1 = tril(v0)                   bool[6, 6]
        v2 = mT(in0)                    f32[1, 2, 4, 6]
        v3 = matmul(in1, v2)            f32[1, 2, 6, 6]
        v4 = bitwise_not(v1)            bool[6, 6]
        v5 = masked_fill(v3, v4, -inf)  f32[1, 2, 6, 6]
        v6 = softmax(v5, -1)            f32[1, 2, 6, 6]
        v7 = matmul(v6, in2)            f32[1, 2, 6, 4]
        return [v7]
        """,
    )
    names = names_in(graph)
    detected = detect(program)
    (one,) = detected.candidates
    read = [names[x] for x in (one.q[0].value, one.k[0].value, one.v.value, *one.values, one.node)]
    assert read == ["in1", "v2", "in2", "v4", "v7"]
    (site,) = recover(program, detected).found
    assert (site.found_by, site.mask_words) == ("eager", "causal")
    same_text(
        graph_text(graph),
        """
        in0                              f32[1, 2, 6, 4]
        in1                              f32[1, 2, 6, 4]
        in2                              f32[1, 2, 6, 4]
        v0 = mT(in0)                     f32[1, 2, 4, 6]
        v1 = reshape(in1, [2, 1, 6, 4])  f32[2, 1, 6, 4]
        v2 = reshape(v0, [2, 4, 6])      f32[2, 4, 6]
        v3 = permute(v2, [0, 2, 1])      f32[2, 6, 4]
        v4 = reshape(v3, [2, 1, 6, 4])   f32[2, 1, 6, 4]
        v5 = reshape(in2, [2, 1, 6, 4])  f32[2, 1, 6, 4]
        v6 = attention(v1, v4, v5, [])   f32[2, 1, 6, 4]
        v7 = reshape(v6, [1, 2, 6, 4])   f32[1, 2, 6, 4]
        return [v7]
        """,
    )


def test_axes_name_each_dimension_and_token_axes_say_which_holds_tokens() -> None:
    _, sites, graph = found(Layer(), *operands())
    axes, lines = lines_of(graph, sites)
    letter = letters(axes)

    def note(node: Node) -> str:
        dims = lines.dims_with_tokens(node)
        return letter(node) + (f"  tokens in {', '.join(map(str, dims))}" if dims else "")

    same_text(
        graph_text(graph, note),
        """
        in0                                f32[12, 4]          abc d
        in1                                f32[1, 6, 4]        1 e d  tokens in 1
        in2                                f32[4, 4]           f bc
        in3                                f32[1, 6, 4]        1 e f  tokens in 1
        v0 = linear(in1, in0)              f32[1, 6, 12]       1 e abc  tokens in 1
        v1 = unflatten(v0, 2, [3, 2, 2])   f32[1, 6, 3, 2, 2]  1 e a b c  tokens in 1
        v2 = permute(v1, [2, 0, 3, 1, 4])  f32[3, 1, 2, 6, 2]  a 1 b e c  tokens in 3
        v3 = select(v2, 0, 0)              f32[1, 2, 6, 2]     1 b e c  tokens in 2
        v4 = select(v2, 0, 1)              f32[1, 2, 6, 2]     1 b e c  tokens in 2
        v5 = select(v2, 0, 2)              f32[1, 2, 6, 2]     1 b e c  tokens in 2
        v6 = attention(v3, v4, v5, [])     f32[1, 2, 6, 2]     1 b e c  tokens in 2
        v7 = transpose(v6, 1, 2)           f32[1, 6, 2, 2]     1 e b c  tokens in 1
        v8 = flatten(v7, 2)                f32[1, 6, 4]        1 e bc  tokens in 1
        v9 = linear(v8, in2)               f32[1, 6, 4]        1 e f  tokens in 1
        v10 = mse_loss(v9, in3, 2)         f32[]
        v11 = div(v10, 24)                 f32[]
        v12 = to(v11, f32)                 f32[]
        return [v12]
        """,
    )


def test_normalize_writes_differences_of_tokens_as_two_slices() -> None:
    _, sites, graph = found(Differences(), *operands())
    axes, lines = lines_of(graph, sites)
    before = graph_text(graph).splitlines()
    assert normalize(graph, axes, lines)
    after = graph_text(graph).splitlines()
    assert before[:-3] == after[:-5]
    same_text(
        "\n".join(before[-3:]),
        """
        v10 = diff(v9, 1, 1)               f32[1, 5, 4]
        v11 = sum(v10)                     f32[]
        return [v11]
        """,
    )
    same_text(
        "\n".join(after[-5:]),
        """
        v10 = slice(v9, 1, 1, 6)           f32[1, 5, 4]
        v11 = slice(v9, 1, 0, 5)           f32[1, 5, 4]
        v12 = sub(v10, v11)                f32[1, 5, 4]
        v13 = sum(v12)                     f32[]
        return [v13]
        """,
    )


def test_place_says_what_is_sharded() -> None:
    _, sites, graph = found(Layer(), *operands())
    placement = place(graph, lines_of(graph, sites)[1])

    def note(node: Node) -> str:
        if placement.is_sharded(node):
            return "sharded"
        return "partial sum" if node in placement.modes else placement.reasons.get(node, "")

    same_text(
        graph_text(graph, note),
        """
        in0                                f32[12, 4]
        in1                                f32[1, 6, 4]
        in2                                f32[4, 4]
        in3                                f32[1, 6, 4]
        v0 = linear(in1, in0)              f32[1, 6, 12]       sharded
        v1 = unflatten(v0, 2, [3, 2, 2])   f32[1, 6, 3, 2, 2]  sharded
        v2 = permute(v1, [2, 0, 3, 1, 4])  f32[3, 1, 2, 6, 2]  sharded
        v3 = select(v2, 0, 0)              f32[1, 2, 6, 2]     sharded
        v4 = select(v2, 0, 1)              f32[1, 2, 6, 2]     sharded
        v5 = select(v2, 0, 2)              f32[1, 2, 6, 2]     sharded
        v6 = attention(v3, v4, v5, [])     f32[1, 2, 6, 2]     sharded
        v7 = transpose(v6, 1, 2)           f32[1, 6, 2, 2]     sharded
        v8 = flatten(v7, 2)                f32[1, 6, 4]        sharded
        v9 = linear(v8, in2)               f32[1, 6, 4]        sharded
        v10 = mse_loss(v9, in3, 2)         f32[]               partial sum
        v11 = div(v10, 24)                 f32[]
        v12 = to(v11, f32)                 f32[]
        return [v12]
        """,
    )


def test_rewrite_gives_what_one_of_two_ranks_runs() -> None:
    program, sites, graph = found(Layer(), *operands())
    placement = place(graph, lines_of(graph, sites)[1])
    (site,) = sites.found
    local = rewrite(program, placement, {site.node: PRODUCTION}, group="ringfx", kernels={})
    same_text(
        graph_text(local.graph_module.graph, show=("strategy", "layout", "group"), shapes=False),
        """
        in0
        in1
        in2
        in3
        in4
        in5
        in6
        v0 = grad_bucket_wait([in0, in2])
        v1 = sub(in4, 0)
        v2 = remainder(v1, 6)
        v3 = slice(in5, 0, 0, 6)
        v4 = sub(in4, 0)
        v5 = ge(v4, 0)
        v6 = lt(v4, 6)
        v7 = logical_and(v5, v6)
        v8 = slice_tokens(in1, v2, v3, 2, 'ringfx', 1, 1, 1, 'input x')
        v9 = slice_tokens(in3, v2, v3, 2, 'ringfx', 1, 1, 1, 'input target')
        v10 = grad_bucket_start(v0, in6, [0, 2], 'ringfx', 'the gradients of qkv.weight an...')
        v11 = getitem(v10, 1)
        v12 = getitem(v10, 0)
        v13 = linear(v8, v12)
        v14 = reshape(v13, [1, 4, 3, 2, 2])
        v15 = permute(v14, [2, 0, 3, 1, 4])
        v16 = select(v15, 0, 0)
        v17 = select(v15, 0, 1)
        v18 = select(v15, 0, 2)
        v19 = attention(v16, v17, v18, [], strategy='production', layout='zigzag', group='ringfx')
        v20 = fill_padding(v19, v18, v7)
        v21 = transpose(v20, 1, 2)
        v22 = reshape(v21, [1, 4, 4])
        v23 = linear(v22, v11)
        v24 = mask_tokens(v23, v7, 0.0, 1, 1, 1)
        v25 = mask_tokens(v9, v7, 0.0, 1, 1, 1)
        v26 = mse_loss(v24, v25, 2)
        v27 = sum_partials(v26, 'ringfx', 'out (test_before_and_after.py)...')
        v28 = div(v27, 24)
        v29 = to(v28, f32)
        return [v29]
        """,
    )
