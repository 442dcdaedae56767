"""Benchmarks compare only with peers that are right, and time passes that exist."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist

from benchmarks.passes import PASSES
from benchmarks.peers import PEERS
from ringfx.compile import pipeline
from ringfx.ir.layout import Layout, LayoutKind
from ringfx.passes import steps
from tests.support.ranks import RankPool

LENGTH, HEADS, HEAD_DIM = 48, 4, 16
Grads = tuple[torch.Tensor, ...]


def _whole() -> Grads:
    torch.manual_seed(0)
    return torch.randn(4, 1, HEADS, LENGTH, HEAD_DIM).unbind()


def _run(causal: bool) -> Mapping[str, Grads]:
    rank, size = dist.get_rank(), dist.get_world_size()
    kind: LayoutKind = "zigzag" if causal else "contiguous"
    mine = Layout(kind, LENGTH, size).positions(rank)
    found = {}
    for name, peer in PEERS.items():
        q, k, v, dout = (x[:, :, mine].clone() for x in _whole())
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = peer(q, k, v, causal)
        found[name] = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("causal", [True, False])
def test_peers_give_the_output_and_gradients_of_unsplit_attention(
    causal: bool, ranks2: RankPool
) -> None:
    q, k, v, dout = _whole()
    leaves = q, k, v = tuple(x.clone().requires_grad_() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    oracle = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    by_rank = ranks2.run(_run, causal)
    layout = Layout("zigzag" if causal else "contiguous", LENGTH, 2)
    for name in PEERS:
        for i, exact in enumerate(oracle):
            joined = torch.cat([found[name][i] for found in by_rank], 2)[:, :, layout.order()]
            torch.testing.assert_close(joined, exact, msg=f"{name}, tensor {i}")


@pytest.mark.parametrize("name", PASSES)
def test_a_timed_pass_is_a_function_of_the_pipeline(name: str) -> None:
    assert callable(getattr(pipeline, name, None) or getattr(steps, name, None))
