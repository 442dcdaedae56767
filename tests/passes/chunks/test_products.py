"""Gradients of weights that are given by the factors of a product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ringfx.compile.compilers import compile_bodies
from ringfx.ops.chunked import Product, body_of
from ringfx.passes.chunks.products import factors_apart
from tests.models.wide import WideModel
from tests.support.programs import lowered

X, W = torch.randn(5, 4), torch.randn(3, 4)

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: torch.nn.functional.linear(x, w),
    "right": lambda x, w: x @ w.t(),
    "left": lambda x, w: w @ x.t(),
    "of a copy": lambda x, w: torch.nn.functional.linear(x.cos(), w.t().contiguous().t()),
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "used twice": lambda x, w: x @ w.t() + x.sin() @ w.t(),
    "scaled": lambda x, w: x @ (2 * w).t(),
    "16 bits": lambda x, w: torch.nn.functional.linear(x.bfloat16(), w.bfloat16()).float(),
    "no product": lambda x, w: (x[:3] * w).sum(0),
}


def gradient(used: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], list[Tensor]]:
    def differentiated(x: Tensor, w: Tensor) -> list[Tensor]:
        w = w.detach().requires_grad_()
        with torch.enable_grad():
            loss = used(x, w).square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, [w])]

    return differentiated


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_given_by_its_factors(name: str) -> None:
    program = make_fx(gradient(PRODUCTS[name]))(X, W)
    loss, expected = program(X, W)
    assert factors_apart(program, [1]) == (1,)
    again, left, right = program(X, W)
    assert torch.equal(again, loss)
    torch.testing.assert_close(left @ right, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_other_results_stay(name: str) -> None:
    program = make_fx(gradient(OTHERS[name]))(X, W)
    assert factors_apart(program, [1]) == ()
    assert len(program(X, W)) == 2


def test_weights_of_a_loss_in_chunks_are_summed_in_place() -> None:
    given = torch.zeros(2, 22, dtype=torch.int64)
    made = lowered(WideModel(), given, given, ranks=2, chunks=3)
    (key,) = (key for key, what in made.local.bodies.items() if what == ("loss",))
    compile_bodies(made.local.bodies, "aot_eager")
    body = body_of(key)
    parts = body.part([torch.zeros_like(x, device="cpu") for x in body.given], 0, 3)
    results = body.run("loss", parts, 3)
    shared = [i for i in body.wanted if body.operands[i] is None and body.given[i].dim() == 2]
    assert shared
    assert sum(isinstance(x, Product) for x in results) == len(shared)
