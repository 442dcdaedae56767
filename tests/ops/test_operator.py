"""The operator as torch sees it: schema, fake tensors, compilers, autocast, errors."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ringfx import ops
from ringfx.errors import InvalidArgument, RingfxError
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import Layout
from ringfx.ir.tiles import CAUSAL
from tests.ops.cases import KINDS, examples, spec
from tests.ops.oracle import data, split
from tests.support.ranks import RankPool
from tests.support.sampling import one_in

Tensor = torch.Tensor


def _compared_by_opcheck(example: Any) -> bool:
    """opcheck takes two NaNs for different; NaN rows are compared in test_values."""
    return example.strategy == "production" and example.spec.fully_masked != "nan"


@pytest.mark.parametrize("example", one_in(3, filter(_compared_by_opcheck, examples(1))))
def test_opcheck(example: Any) -> None:
    found = data(example)
    lengths = (example.spec.q_len, example.spec.kv_len, example.spec.kv_len)
    q, k, v = (
        split(x, Layout(example.layout, length, 1), 0).requires_grad_()
        for x, length in zip((found.q, found.k, found.v), lengths, strict=True)
    )
    inputs = [
        x.requires_grad_(example.trains_inputs and x.is_floating_point()) for x in found.inputs
    ]
    settings = (example.spec.to_json(), example.strategy, example.layout, "", "layer", "", [])
    torch.library.opcheck(torch.ops.ringfx.attention.default, (q, k, v, inputs, *settings))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_opcheck_of_shard_and_gather(layout: str) -> None:
    assert ops.shard, "the operators are registered when their functions are first asked for"
    whole = torch.randn(3, 7, 2, requires_grad=True)
    local = torch.randn(3, 8 if layout == "zigzag" else 7, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.ringfx.shard.default, (whole, 1, layout, 1, ""))
    torch.library.opcheck(torch.ops.ringfx.gather.default, (local, 1, layout, 7, 1, ""))


def test_fake_tensors_need_no_process_group() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 4, 8, 16, requires_grad=True)
        out = _attention(q, q, q, q_len=64, group="a group of another machine")
        out.sum().backward()
    assert out.shape == (2, 4, 8, 16)
    assert q.grad is not None
    assert q.grad.shape == q.shape


def _attention(q: Tensor, k: Tensor, v: Tensor, *, q_len: int, **settings: Any) -> Tensor:
    given: dict[str, Any] = {
        "strategy": "production",
        "layout": "contiguous",
        "group": "",
        "inputs": (),
    }
    given |= {"spec": spec(q_len, keep=CAUSAL).to_json()} | settings
    return ops.attention(q, k, v, given.pop("inputs"), **given)


def _model(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = ops.ring_attention(
        q, k, v, causal=True, window=3, sinks=sinks, dropout=0.3, seed=11
    )  # fmt: skip
    return (out.transpose(1, 2).flatten(2) * 2).sin()


def _leaves() -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(2, 9, 4, 8) for _ in range(3)] + [torch.randn(4)]
    return [x.requires_grad_() for x in made]


def _gradients(model: Callable[..., Tensor]) -> list[Tensor]:
    leaves = _leaves()
    return list(torch.autograd.grad(model(*leaves).sum(), leaves))


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_compiled_without_graph_breaks(backend: str) -> None:
    compiled = torch.compile(_model, backend=backend, fullgraph=True)
    torch.testing.assert_close(_gradients(compiled), _gradients(_model), rtol=1e-5, atol=1e-5)


def _tokens() -> Tensor:
    return torch.randn(2, 4, 13, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _compiled_on_ranks() -> tuple[Tensor, Tensor]:
    x, seed = _tokens(), torch.tensor(11)

    def model(x: Tensor) -> Tensor:
        local = ops.shard(x, 2, layout="zigzag")
        out = ops.ring_attention(
            local, local, local, causal=True, layout="zigzag", length=13, dropout=0.3, seed=seed
        )
        return ops.gather(out, 2, layout="zigzag", length=13)

    return torch.compile(model, backend="aot_eager")(x), model(x)


@pytest.mark.ranks
def test_compiled_on_ranks(ranks2: RankPool) -> None:
    x = _tokens()
    alone = ops.ring_attention(x, x, x, causal=True, dropout=0.3, seed=11)
    for compiled, eager in ranks2.run(_compiled_on_ranks):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
        torch.testing.assert_close(eager, alone, rtol=1e-12, atol=1e-12)


def test_autocast_gives_what_sdpa_gives() -> None:
    q, k, v = (x.detach() for x in _leaves()[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.ring_attention(q, k, v)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_have_the_dtype_of_what_they_belong_to(dtype: torch.dtype) -> None:
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in _leaves()[:3])
    out = ops.ring_attention(q, k, v, causal=True)
    out.float().sum().backward()
    assert {x.dtype for x in (out, q.grad, k.grad, v.grad) if x is not None} == {dtype}


def test_no_score_matrix_is_stored_for_a_causal_sequence() -> None:
    """At 16,384 tokens one matrix of scores would be 1 GiB in float32."""
    q = torch.zeros(1, 1, 16384, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        ops.ring_attention(q, q, q, causal=True, window=64)
    allocated = max(event.cpu_memory_usage for event in profile.events())
    assert allocated < 16 << 20, allocated


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"strategy": "best"}, InvalidArgument, "no strategy is named 'best'. Do: use simple"),
        ({"layout": "striped"}, InvalidArgument, "layout is 'striped'. Do: use 'contiguous'"),
        ({"q_len": 10}, InvalidArgument, "q has 9 tokens on rank 0; 10 tokens in contiguous"),
        ({"group": "none such"}, InvalidArgument, "no process group is named 'none such'"),
        (
            {"spec": spec(9, dropout=0.1).to_json()},
            InvalidArgument,
            "layers.3: dropout 0.1 with no tensor as its seed. Do: pass one int64 as the last",
        ),
        (
            {"spec": spec(9, sinks=True).to_json()},
            InvalidArgument,
            "sinks have shape None; here are 4 heads",
        ),
    ],
)
def test_a_wrong_call_says_what_is_wrong(
    settings: dict[str, Any], error: type[RingfxError], text: str
) -> None:
    q = torch.randn(2, 4, 9, 8)
    given: dict[str, Any] = {"q_len": 9, "name": "layers.3"} | settings
    with pytest.raises(error) as raised:
        _attention(q, q, q, **given)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (((2, 4, 9, 8), (2, 3, 9, 8), (2, 3, 9, 8)), "4 query heads for 3 key/value heads"),
        (((2, 4, 9, 8), (2, 4, 9, 6), (2, 4, 9, 8)), "q and k one head dim"),
        (((2, 4, 9, 8), (1, 4, 9, 8), (1, 4, 9, 8)), "one batch size"),
        (((2, 4, 9, 8), (2, 4, 9, 8), (2, 2, 9, 8)), "k and v one number of heads"),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], text: str) -> None:
    q, k, v = (torch.randn(shape) for shape in shapes)
    with pytest.raises(InvalidArgument, match=text):
        _attention(q, k, v, q_len=9)


def test_mixed_dtypes_are_refused() -> None:
    q = torch.randn(2, 4, 9, 8)
    with pytest.raises(InvalidArgument, match=r"q is torch.float32, k torch.float64"):
        _attention(q, q.double(), q, q_len=9)


def test_what_only_the_mask_reads_gets_no_gradient_as_comparisons_have_none() -> None:
    q = torch.randn(2, 4, 9, 8, requires_grad=True)
    threshold = torch.zeros(9, requires_grad=True)
    keep = ("gt", ("at", 0, ("k",)), ("const", -1))
    out = ops.ring_attention(q, q, q, keep=keep, inputs=[threshold])
    out.sum().backward()
    assert threshold.grad is None
    assert q.grad is not None


def test_a_gradient_through_an_unknown_operator_is_refused_not_lost() -> None:
    q = torch.randn(2, 4, 9, 8, requires_grad=True)
    slope = torch.ones(4, requires_grad=True)
    bias = ("fmod", ("at", 0, ("h",)), ("const", 2))
    out = ops.ring_attention(q, q, q, bias=bias, inputs=[slope])
    with pytest.raises(InvalidArgument, match='captured tensor through "fmod"'):
        out.sum().backward()


def test_the_table_of_kinds_covers_every_field_of_the_spec() -> None:
    specs = [example.spec for example in KINDS.values()]
    assert any(s.bias for s in specs)
    assert any(s.soft_cap for s in specs)
    assert any(s.sinks for s in specs)
    meanings = typing.get_type_hints(AttentionSpec)["fully_masked"]
    assert {s.fully_masked for s in specs} == set(typing.get_args(meanings))
