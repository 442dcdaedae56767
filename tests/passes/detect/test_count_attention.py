"""The independent count: what looks like attention, whatever detection makes of it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ringfx.errors import AttentionMissed
from ringfx.ir.values import Declined, Sites
from ringfx.passes.detect import detect
from ringfx.passes.detect.count_attention import find_attention_like, missed, refuse_missed
from ringfx.passes.masks import recover
from tests.models.calls import by_heads
from tests.support.programs import captured

D = 8
Projections = Callable[..., Tensor]


class Written(nn.Module):
    """``core(q, k, v, x, extra parameters)`` on projections [batch, tokens, dim]."""

    def __init__(self, core: Projections) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.table = nn.Parameter(torch.randn(5, D))
        self.out = nn.Linear(D, D)
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        made = self.core(self.q(x), self.k(x), self.v(x), x, self.table)
        return self.out(made)


def plain(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return (q @ k.mT / 3).softmax(-1) @ v


def decomposed(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    scores = torch.einsum("bqd,bkd->bqk", q, k)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bqk,bkd->bqd", weights / weights.sum(-1, keepdim=True), v)


def differential(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    first, second = (
        (a @ b.mT).softmax(-1) for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
    )
    return (first - 0.3 * second) @ v


def capped(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    scores = torch.tanh(q @ k.mT / 5) * 5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).float().softmax(-1).to(v.dtype) @ v


def called(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def router(q: Tensor, k: Tensor, v: Tensor, x: Tensor, table: Tensor) -> Tensor:
    return q * (x @ table.mT).softmax(-1).amax(-1, keepdim=True)


def memory_layer(q: Tensor, k: Tensor, v: Tensor, x: Tensor, table: Tensor) -> Tensor:
    return (q @ table.mT).softmax(-1) @ table


def learned_query(q: Tensor, k: Tensor, v: Tensor, x: Tensor, table: Tensor) -> Tensor:
    return ((table @ k.mT).softmax(-1) @ v).mean(1, keepdim=True) + x


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.softmax(-1) @ (k.softmax(1).mT @ v)


def contrastive(q: Tensor, k: Tensor, v: Tensor, x: Tensor, table: Tensor) -> Tensor:
    return x + (q @ k.mT).softmax(-1).amax(-1, keepdim=True)


COUNTS = {
    plain: 1,
    decomposed: 1,
    differential: 2,
    capped: 1,
    called: 1,
    router: 0,
    memory_layer: 0,
    learned_query: 0,
    linear_attention: 0,
    contrastive: 0,
}


@pytest.mark.parametrize("core", COUNTS, ids=lambda core: core.__name__)
def test_what_looks_like_attention_is_counted_and_what_only_resembles_it_is_not(
    core: Projections,
) -> None:
    assert len(find_attention_like(captured(Written(core), torch.randn(2, 6, D)))) == COUNTS[core]


def test_layers_count_one_by_one() -> None:
    model = nn.Sequential(*(Written(plain) for _ in range(4)), Written(called))
    assert len(find_attention_like(captured(model, torch.randn(2, 6, D)))) == 5


def test_what_was_found_is_no_longer_counted() -> None:
    program = captured(Written(called), torch.randn(2, 6, D))
    assert missed(program, recover(program, detect(program))) == ((), 1)


def test_what_was_overlooked_is_named_unless_a_near_miss_explains_it() -> None:
    program = captured(nn.Sequential(Written(plain), Written(plain)), torch.randn(2, 6, D))
    nothing = Sites(found=())
    overlooked, total = missed(program, nothing)
    assert total == 2
    assert len(overlooked) == 2
    product = next(n for n in program.graph_module.graph.nodes if n.name.startswith("matmul"))
    near = Declined(node=product.name, name="", source="", reason="its weights are read")
    assert missed(program, replace(nothing, declined=(near,))) == (overlooked[1:], 2)


def test_a_declined_kernel_counts_as_explained() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out * lse[..., None].to(out.dtype)

    program = captured(by_heads(core)(), torch.randn(2, 11, 24))
    assert missed(program, recover(program, detect(program))) == ((), 1)


def test_strict_mode_names_every_place() -> None:
    refuse_missed(())
    near = Declined(node="softmax_3", name="layers.1", source="model.py:17", reason="")
    with pytest.raises(AttentionMissed) as error:
        refuse_missed((near, replace(near, name="layers.2")))
    assert str(error.value) == (
        "2 of the program's attentions were not recognised and would be "
        "replicated on every rank:\n"
        "  layers.1 (model.py:17), softmax_3\n"
        "  layers.2 (model.py:17), softmax_3\n"
        "Do: call torch.nn.functional.scaled_dot_product_attention there, or leave strict out; "
        "`ringfx explain` lists every attention that was found and every "
        "rejected one."
    )


def test_counting_is_linear_in_the_number_of_layers() -> None:
    """Paths end at products, so that a layer is walked once however deep the model is."""
    visits = [_visits(layers) for layers in (4, 8, 16)]
    grown = list(map(operator.sub, visits[1:], visits))
    assert grown[1] == 2 * grown[0]


def _visits(layers: int) -> int:
    program = captured(
        nn.Sequential(*(Written(plain) for _ in range(layers))), torch.randn(2, 6, D)
    )
    return sum(len(found.region) for found in find_attention_like(program))
