"""Transformed regions and flex attention become plain operators with equal values and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import ringfx
from ringfx.errors import CaptureRefused
from tests.harness import Case, Comparison, compare_all, compare_here
from tests.passes.constructs import Around, total
from tests.passes.models import HIDDEN
from tests.passes.programs import captured, lowered
from tests.passes.transforms import (
    FLEX,
    TRANSFORMS,
    Flex,
    Transformed,
    flex_in_eager,
    flex_trains,
    heads_of,
    merged,
)
from tests.ranks import RankPool

Tensor = torch.Tensor
SEQ_LEN = 7


def x() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, SEQ_LEN, HIDDEN, generator=generator).requires_grad_(),)


def case(label: str, **more: Any) -> Case:
    model: Callable[[], nn.Module] = functools.partial(
        Transformed if label in TRANSFORMS else Flex, label
    )
    return Case(
        model=model, inputs=x, dtype=torch.float64, loss=total, options={"compiler": "eager"},
        label=label, **more,
    )  # fmt: skip


def here(label: str, **more: Any) -> Comparison:
    return compare_here(case(label, **more))


@pytest.mark.parametrize("label", TRANSFORMS)
def test_a_transform_keeps_outputs_and_gradients(label: str) -> None:
    here(label).check()


@pytest.mark.parametrize("label", FLEX)
def test_flex_attention_is_what_it_is_defined_to_be(label: str) -> None:
    with flex_in_eager():
        here(label, backward=False).check()


@pytest.mark.parametrize("label", FLEX)
def test_flex_attention_trains(label: str) -> None:
    with flex_trains():
        here(label).check()


def test_without_it_torch_refuses_gradients_of_flex_on_the_cpu() -> None:
    with pytest.raises(Exception, match="does not support backward on CPU"):
        here("flex, causal")


def compare_with_flex(cases: tuple[Case, ...]) -> Any:
    from tests.harness import _compare_cases

    with flex_trains():
        return _compare_cases(cases)


@pytest.mark.parametrize(
    "labels",
    [
        ("a mask by vmap", "flex, packed documents", "flex, ALiBi"),
        pytest.param((*TRANSFORMS, *FLEX), marks=pytest.mark.slow, id="all"),
    ],
)
def test_they_are_right_on_two_ranks(ranks2: RankPool, labels: tuple[str, ...]) -> None:
    for found in compare_all(ranks2, [case(n) for n in labels if n in TRANSFORMS]):
        found.check()
    chosen = [case(n) for n in labels if n in FLEX]
    by_rank = ranks2.run(compare_with_flex, tuple(chosen))
    for i, one in enumerate(chosen):
        ranks = tuple(differences[i] for differences in by_rank)
        Comparison(label=one.label, dtype=one.dtype, ranks=ranks).check()


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
    with torch.no_grad(), pytest.raises(CaptureRefused, match="its blocks alone") as caught:
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
    with pytest.raises(CaptureRefused, match="turns gradients off inside"):
        ringfx.optimize(NoGradInside(), compiler="eager")(*x())
