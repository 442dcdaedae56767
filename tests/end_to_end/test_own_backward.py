"""torch.autograd.Function: split where forward and its own backward prove it, whole elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ringfx
from ringfx.ir.values import CommKind
from tests.end_to_end.test_constructs import HIDDEN, Around, mean_square, only_tokens
from tests.models.gradient_hooks import Hooked
from tests.models.shapes import HIDDEN as WIDE
from tests.support.harness import Case, RankPool, compare_all


def function(
    forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Applies a Function of x and a weight; backward is given (gradient, x, weight)."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            result: Tensor = forward(x, weight)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return backward(grads[0], *ctx.saved_tensors)

    return Made.apply  # type: ignore[no-any-return]


def product(x: Tensor, w: Tensor) -> Tensor:
    return x * w


def total(g: Tensor) -> Tensor:
    return g.sum((0, 1))


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, HIDDEN)


def norm(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w


def norm_backward(g: Tensor, x: Tensor, w: Tensor) -> Any:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    normed, inner = x * scale, g * w
    mean = (inner * normed).mean(-1, keepdim=True)
    return scale * (inner - normed * mean), total(g * normed)


SPLIT: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "three times the gradient": (product, lambda g, x, w: (g * w * 3, total(g * x) * 3)),
    "a clipped gradient": (product, lambda g, x, w: ((g * w).clamp(-1e-3, 1e-3), total(g * x))),
    "a gradient passed on where x is positive": (
        lambda x, w: (x * w).round(),
        lambda g, x, w: (torch.where(x > 0, g, 0 * g), -total(g * x.sign()) / 2),
    ),
    "a norm": (norm, norm_backward),
    "a layer on rows": (
        lambda x, w: x @ torch.outer(w, w),
        lambda g, x, w: (
            g @ torch.outer(w, w), (rows(x).t() @ rows(g)) @ w + (rows(g).t() @ rows(x)) @ w
        ),
    ),
    "a gradient turned round": (lambda x, w: x.view_as(x), lambda g, x, w: (-g, None)),
    "no gradient of the weight": (product, lambda g, x, w: (g.sign() * w, None)),
}  # fmt: skip
WHOLE: Mapping[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "a mean over tokens": (lambda x, w: x - x.mean(1, keepdim=True) * w, lambda g, x, w: (g, w)),
    "clipped after the sum": (product, lambda g, x, w: (g, total(g * x).clamp(-1e-3, 1e-3))),
    "a penalty in the gradient": (product, lambda g, x, w: (g + x.sign() / 100, total(g * x))),
    "a mean of gradients": (product, lambda g, x, w: (g, (g * x).mean((0, 1)))),
    "a gradient of the weight alone": (product, lambda g, x, w: (g, w / 100)),
    "sums that are multiplied": (product, lambda g, x, w: (g, total(g) * total(x * g))),
    "what a neighbour has": (lambda x, w: x.flip(1) * w, lambda g, x, w: (g.flip(1), total(g))),
    "a softmax over tokens": (lambda x, w: x.softmax(1) * w, lambda g, x, w: (g, total(g))),
    "a shape and a type of the gradient": (
        product,
        lambda g, x, w: (x.view_as(g).type_as(g), total(g * x)),
    ),
    "a sum of saved values": (product, lambda g, x, w: (g * x.sum(1, keepdim=True), total(g))),
}
TURNED = (
    "clipped after the sum", "a mean of gradients", "sums that are multiplied",
    "a softmax over tokens", "a sum of saved values",
)  # fmt: skip
"""Of these each rank computes whole rows of fewer channels: no value is whole."""
APPLIED = {name: function(*bodies) for name, bodies in {**SPLIT, **WHOLE}.items()}


class Between(Around):
    def __init__(self, name: str) -> None:
        super().__init__("detach")
        self.name = name
        self.after = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = self.after(APPLIED[self.name](x + self.attend(x), self.weight))
        result: Tensor = self.out(x + self.attend(x))
        return result


def case(name: str) -> Case:
    return Case(
        model=functools.partial(Between, name), inputs=only_tokens, loss=mean_square,
        dtype=torch.float64, options={"compiler": "eager"}, label=name,
    )  # fmt: skip


def test_gradients_are_those_of_the_backward_that_is_its_own(ranks3: RankPool) -> None:
    names = [*SPLIT, *TURNED[:3], "a penalty in the gradient"]
    for found in compare_all(ranks3, [case(name) for name in names]):
        found.check()


@pytest.mark.parametrize("name", ["a gradient hook", "a gradient hook that reads a parameter"])
def test_a_hook_on_hidden_states_runs_on_each_ranks_tokens(name: str) -> None:
    plan = ringfx.plan(Hooked(name), (torch.randn(2, 13, WIDE).requires_grad_(),), world_size=3)
    assert not [m for m in plan.collectives if "own_backward" in m.reason]


@pytest.mark.parametrize("name", APPLIED)
def test_it_runs_split_where_both_bodies_prove_it(name: str) -> None:
    plan = ringfx.plan(Between(name), tuple(only_tokens().values()), world_size=3)
    gathered = [m for m in plan.collectives if "own_backward" in m.reason]
    turned = [m for m in plan.collectives if m.kind is CommKind.ALL_TO_ALL]
    assert bool(gathered) == (name in WHOLE and name not in TURNED), gathered
    assert bool(turned) == (name in TURNED), turned
