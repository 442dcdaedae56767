"""However a mask is spelled, its tile function is that mask, and no S x S tensor is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Node
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ringfx.ir import tiles
from ringfx.ir.tiles import const
from ringfx.ir.values import AttentionSite, Captured
from ringfx.passes.axes.call import given_input
from ringfx.passes.detect import detect
from ringfx.passes.detect.candidate import score
from ringfx.passes.exprs.simplify import assuming, simplify
from ringfx.passes.masks import recover
from tests.passes.masks.spellings import BATCH, HEADS, SPELLINGS, Spelling
from tests.support.programs import Attend, captured_with_inputs

HEAD_DIM = 8
LENGTHS = {"square": (13, 13), "more keys": (13, 17), "more queries": (17, 13)}


def operands(q_len: int, kv_len: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(BATCH, HEADS, n, HEAD_DIM, generator=generator) for n in (q_len, kv_len, kv_len)
    )


@dataclass(frozen=True, eq=False)
class Recovered:
    program: Captured
    site: AttentionSite
    inputs: Sequence[torch.Tensor]
    """The tensors that the site's tile functions read, computed on the call's inputs."""


def recovered(model: nn.Module, *args: Any, **kwargs: Any) -> Recovered:
    program, values = captured_with_inputs(model, *args, **kwargs)
    sites = recover(program, detect(program))
    assert not sites.declined, sites.declined
    site = sites.found[0]
    graph = program.graph_module.graph
    (node,) = (n for n in graph.nodes if n.name == site.node)
    reader = torch.fx.Interpreter(program.graph_module, garbage_collect_values=False)
    reader.run(*values)
    read: Any = node.args[3]
    return Recovered(program, site, [reader.env[n] for n in read])


def added(found: Recovered) -> torch.Tensor:
    """What the canonical operator adds to the scores: the bias, and -inf where not kept."""
    site, inputs = found.site, found.inputs
    shape = (site.batch, site.heads, site.q_len, site.kv_len)
    index = tiles.TileIndex(*(torch.arange(n) for n in shape))
    total = torch.zeros(shape)
    if site.spec.bias is not None:
        total = total + tiles.evaluate(site.spec.bias, index, inputs)
    if site.spec.keep is not None:
        keep = tiles.evaluate(site.spec.keep, index, inputs).to(torch.bool)
        total = torch.where(keep, total, -math.inf)
    return total.expand(shape)


def expected(spelling: Spelling, q_len: int, kv_len: int) -> torch.Tensor:
    mask = spelling.mask(q_len, kv_len, *spelling.inputs(q_len, kv_len))
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    return mask.expand(BATCH, HEADS, q_len, kv_len)


def settled(mask: torch.Tensor, mean: bool = False) -> torch.Tensor:
    """An additive mask with what has no weight at -inf, and rows that become a mean at 0."""
    low = mask <= -9_900
    hidden = low.all(-1, keepdim=True)
    absorbed = (mask <= -1e30) & (mask == mask[..., :1]) & (mask > -math.inf)
    absorbed = absorbed.all(-1, keepdim=True)
    mask = mask.masked_fill(low & ~hidden, -math.inf)
    return mask.masked_fill(absorbed | (hidden & mean), 0.0)


def sizes_of(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def matrices(program: Captured, q_len: int, kv_len: int) -> list[str]:
    """Computed values with both a query and a key dimension; a part of an input is none."""
    both = []
    for node in program.graph_module.graph.nodes:
        sizes = list(sizes_of(node))
        if given_input(node) is None and q_len in sizes:
            sizes.remove(q_len)
            both += [f"{node.name} {sizes_of(node)}"] if kv_len in sizes else []
    return both


XFAIL: dict[tuple[str, str], Any] = {}


def examples() -> list[Any]:
    return [
        pytest.param(name, *lengths, id=f"{name}-{which}", marks=XFAIL.get((name, which), ()))
        for name, spelling in SPELLINGS.items()
        for which, lengths in LENGTHS.items()
        if which == "square" or not spelling.square
    ]


@pytest.mark.parametrize(("name", "q_len", "kv_len"), examples())
def test_the_tile_function_is_the_mask(name: str, q_len: int, kv_len: int) -> None:
    spelling = SPELLINGS[name]
    args = (*operands(q_len, kv_len), *spelling.inputs(q_len, kv_len))
    found = recovered(Attend(spelling.mask), *args)
    mean = found.site.spec.fully_masked in ("mean", "absorbed")
    ours = added(found)
    theirs = expected(spelling, q_len, kv_len)
    torch.testing.assert_close(settled(ours, mean), settled(theirs), rtol=0, atol=0)
    assert matrices(found.program, q_len, kv_len) == []
    if q_len == kv_len and spelling.words:
        assert found.site.mask_words == spelling.words


def integers() -> st.SearchStrategy[tiles.Expr]:
    leaves = st.sampled_from([tiles.Q, tiles.K]) | st.integers(-3, 3).map(const)
    return st.recursive(
        leaves,
        lambda inner: (
            st.tuples(st.sampled_from(["add", "sub"]), inner, inner)
            | st.tuples(st.just("neg"), inner)
        ),
        max_leaves=4,
    )


def booleans() -> st.SearchStrategy[tiles.Expr]:
    heads = st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"])
    return st.recursive(
        st.tuples(heads, integers(), integers()),
        lambda inner: (
            st.tuples(st.sampled_from(["and", "or", "xor"]), inner, inner)
            | st.tuples(st.just("not"), inner)
            | st.tuples(st.just("where"), inner, inner, inner)
        ),
        max_leaves=4,
    )


def normal_form(expr: tiles.Expr) -> tiles.Expr:
    head, *parts = expr
    if head in ("q", "k", "const"):
        return expr
    return simplify(head, *(normal_form(part) for part in parts))


@given(expr=booleans())
@settings(max_examples=300)
def test_a_normal_form_says_the_same(expr: tiles.Expr) -> None:
    one, length = torch.arange(1), torch.arange(7)
    index = tiles.TileIndex(b=one, h=one, q=length, k=length)
    shape = (1, 1, 7, 7)
    plain, simple = (tiles.evaluate(e, index, ()) for e in (expr, normal_form(expr)))
    assert torch.equal(plain.bool().expand(shape), simple.bool().expand(shape))


SIZES: Mapping[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False,
}  # fmt: skip


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def mistral() -> nn.Module:
    return MistralForCausalLM(MistralConfig(sliding_window=5, **SIZES))


def causal(seq_len: int) -> torch.Tensor:
    return torch.ones(seq_len, seq_len, dtype=torch.bool).tril()


def hugging_face() -> list[Any]:
    ids = torch.zeros(2, 13, dtype=torch.int64)
    padded = torch.ones_like(ids)
    padded[0, :4] = padded[1, -3:] = 0
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None].expand(2, -1)
    packed = causal(13) & (torch.arange(13)[:, None] >= 6).eq(torch.arange(13) >= 6)
    return [
        (llama, {}, "causal", causal(13)),
        (llama, {"attention_mask": torch.ones_like(ids)}, "causal, key padding", causal(13)),
        (
            llama,
            {"attention_mask": padded},
            "causal, key padding",
            causal(13) & padded.bool()[:, None, None, :],
        ),
        (llama, {"position_ids": positions}, "causal, packed documents", packed),
        (mistral, {}, "causal, window 5", causal(13).triu(-4)),
    ]


@pytest.mark.parametrize(("model", "inputs", "words", "keep"), hugging_face())
def test_hugging_face_masks(model: Any, inputs: Any, words: str, keep: torch.Tensor) -> None:
    found = recovered(model(), input_ids=torch.zeros(2, 13, dtype=torch.int64), **inputs)
    oracle = torch.zeros(keep.shape).masked_fill(~keep, -math.inf).expand(2, 4, 13, 13)
    torch.testing.assert_close(added(found), oracle, rtol=0, atol=0)
    assert set(words.split(", ")) <= set(found.site.mask_words.split(", "))
    assert matrices(found.program, 13, 13) == []


def test_is_causal_and_a_flat_attention_are_the_same_mask() -> None:
    q, k, v = (x.flatten(0, 1) for x in operands(13, 13))
    found = recovered(Attend(lambda q_len, kv_len: None, is_causal=True), q, k, v)
    assert found.site.spec.is_causal
    assert (found.site.batch, found.site.heads) == (BATCH * HEADS, 1)
    assert found.site.density == pytest.approx(7 / 13)


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HEADS, 13, 13))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, self.bias)


def test_a_learned_bias_is_carried() -> None:
    program, _ = captured_with_inputs(Learned(), *operands(13, 13))
    sites = recover(program, detect(program))
    assert sites.found[0].spec.bias is not None
    assert sites.declined == ()


def test_an_assumption_reaches_the_conditions_beside_scores() -> None:
    kept, scores = tiles.CAUSAL, score()
    chosen = ("where", kept, ("mul", scores, const(2.0)), const(-1e9))
    assert assuming(chosen, kept, True) == ("mul", scores, const(2.0))
    assert assuming(scores, kept, True) == scores
