"""Flex attention and transforms beyond what the conformance table holds."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import ringfx
from ringfx.errors import CaptureRefused
from tests.models.constructs import Around
from tests.models.shapes import HIDDEN
from tests.models.transforms import Flex, heads_of, merged
from tests.support.programs import captured, lowered

Tensor = torch.Tensor
SEQ_LEN = 7


def x() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, SEQ_LEN, HIDDEN, generator=generator).requires_grad_(),)


def test_flex_trains_on_a_cpu_where_its_own_kernel_has_no_backward() -> None:
    (given,) = x()
    ringfx.optimize(Flex("flex, causal"), compiler="eager")(given).sum().backward()
    assert given.grad is not None
    torch._dynamo.reset()
    with pytest.raises(Exception, match="does not support backward on CPU"):
        torch.compile(Flex("flex, causal"), backend="eager")(*x())


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("flex, causal", "causal"),
        ("flex, packed documents", "causal, packed documents"),
        ("flex, ALiBi", "causal, ALiBi bias"),
    ],
)
def test_a_flex_mask_is_recovered_in_words(label: str, words: str) -> None:
    with torch.no_grad():
        program = lowered(Flex(label), x()[0].detach())
    assert [layer.site.mask_words for layer in program.plan.layers][1] == words


def test_what_builds_a_block_mask_is_never_traced() -> None:
    with torch.no_grad():
        program = captured(Flex("flex, packed documents"), x()[0].detach())
    targets = {str(n.target) for n in program.graph_module.graph.nodes}
    assert not [t for t in targets if "sort" in t or "index_put" in t]


class Blocks(Around):
    """A block mask of blocks alone."""

    def between(self, x: Tensor) -> Tensor:
        q = heads_of(x)
        one = torch.ones(1, 1, 2, dtype=torch.int32)
        mask = BlockMask.from_kv_blocks(
            one, torch.zeros(1, 1, 2, 2, dtype=torch.int32), BLOCK_SIZE=4,
            seq_lengths=(SEQ_LEN, SEQ_LEN),
        )  # fmt: skip
        return merged(flex_attention(q, q, q, block_mask=mask))


def test_a_mask_of_blocks_alone_is_refused() -> None:
    with torch.no_grad(), pytest.raises(CaptureRefused, match="only its blocks") as caught:
        ringfx.optimize(Blocks(), compiler="eager")(x()[0].detach())
    assert "Do: " in str(caught.value)


class NoGradInside(Around):
    def between(self, x: Tensor) -> Tensor:
        def partly(row: Tensor) -> Tensor:
            with torch.no_grad():
                scale = row * 2
            return row * scale

        result: Tensor = torch.vmap(partly)(x)
        return result


def test_a_gradient_mode_inside_a_transform_is_refused() -> None:
    with pytest.raises(CaptureRefused, match=r"with torch.no_grad\(\) inside"):
        ringfx.optimize(NoGradInside(), compiler="eager")(*x())
