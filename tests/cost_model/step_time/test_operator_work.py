"""Operations are torch's own count; bytes are what a kernel must read and write."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode

from ringfx.cost_model.peak_memory.liveness import Values, values_of
from ringfx.cost_model.peak_memory.timeline_of import num_bytes
from ringfx.cost_model.step_time.operator_work import works
from tests.cost_model.peak_memory.test_peak import _captured


def values(function: Callable[..., Tensor], *inputs: Tensor) -> Values:
    captured = _captured(function, *inputs)
    graph = captured.graph_module.graph
    given = graph.find_nodes(op="placeholder")
    return values_of(graph, num_bytes, dict(zip(given, captured.needs_grad, strict=True)))


def whole(node: Node) -> float:
    return 1.0


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


PRODUCTS = {
    "linear": (lambda x, w: F.linear(x, w), (leaf(2, 8, 16), leaf(32, 16))),
    "matmul": (lambda x, y: x @ y, (leaf(2, 3, 8, 16), leaf(2, 3, 16, 4))),
    "bmm": (torch.bmm, (leaf(3, 8, 16), leaf(3, 16, 4))),
    "addmm": (torch.addmm, (leaf(8, 4), leaf(8, 16), leaf(16, 4))),
    "einsum": (lambda x, y: torch.einsum("bsd,hde->bhse", x, y), (leaf(2, 8, 16), leaf(3, 16, 4))),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding=1), (leaf(2, 6, 32), leaf(8, 6, 3))),
    "frozen weight": (lambda x, w: F.linear(x, w), (leaf(2, 8, 16), torch.randn(32, 16))),
    "three in a row": (
        lambda x, v, w: F.linear(F.gelu(F.linear(x, v)), w),
        (leaf(2, 8, 16), leaf(64, 16), leaf(16, 64)),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_operations_are_those_that_torch_counts(name: str) -> None:
    function, inputs = PRODUCTS[name]
    found = works(values(function, *inputs), whole, fused=True)
    with FlopCounterMode(display=False) as counter:
        result = function(*inputs)
        forward = counter.get_total_flops()
        result.sum().backward()
        both = counter.get_total_flops()
    assert sum(x.forward.flops for x in found.values()) == forward
    assert sum(x.backward.flops for x in found.values()) == both - forward


def chain(x: Tensor) -> Tensor:
    return (x * 2 + 1).sin().exp()


def test_a_chain_is_read_and_written_once_if_it_is_fused() -> None:
    of_chain = values(chain, torch.randn(1024))
    fused, apart = (
        sum(w.forward.bytes for w in works(of_chain, whole, fused=how).values())
        for how in (True, False)
    )
    assert fused == 2 * 4096
    assert apart == 4 * 2 * 4096


def test_a_product_parts_what_is_fused() -> None:
    weight = torch.randn(32, 32)
    found = values(lambda x, w: ((x + 1).sin() @ w).exp() + x, torch.randn(32, 32), weight)
    calls = sum(w.forward.calls for w in works(found, whole, fused=True).values())
    assert calls == 3


def test_a_rank_does_its_share() -> None:
    function, inputs = PRODUCTS["three in a row"]
    of_all = values(function, *inputs)
    parameters = set(of_all.nodes[1:3])

    def half(node: Node) -> float:
        return 1.0 if node in parameters else 0.5

    one, two = (works(of_all, share, fused=True) for share in (whole, half))
    for node, work in one.items():
        assert two[node].forward.flops == work.forward.flops / 2
        assert two[node].backward.flops == work.backward.flops / 2
