"""Inductor's own attention fusion does not get what ringfx left as it stands."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F

import ringfx
from ringfx.compile.inductor_settings import inductor_settings

Tensor = torch.Tensor
SIZE = 4


class Untransposed(nn.Module):
    """softmax(q k / 2) v, with k in an order of its own: right where its sizes agree."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.permute(0, 1, 2, 3) / 2, -1) @ v


class Beside(Untransposed):
    """And an attention that ringfx finds."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v) + super().forward(q, k, v)


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((SIZE,) * 4, generator=generator) for _ in range(3)]


def as_it_is(gm: Any, inputs: Any, **options: Any) -> Any:
    """Stands for code generation: what the passes left is run as it is."""
    return lambda *given: gm(*(given[0] if isinstance(given[0], list) else given))


def error(patches: dict[str, Any]) -> float:
    torch._dynamo.reset()
    counters.clear()
    model, given = Untransposed(), operands()
    patches = {"fx_graph_cache": False} | patches

    def backend(gm: Any, inputs: Any) -> Any:
        return compile_fx(gm, inputs, inner_compile=as_it_is, config_patches=patches)

    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        return float((compiled(*given) - model(*given)).abs().max())


def test_inductor_takes_a_product_without_transpose_for_attention() -> None:
    """The defect for which ringfx/compile/inductor_no_fusion.py exists; both go together."""
    assert error({}) > 0.1
    assert counters["inductor"]["fuse_attention"] == 1


def test_kept_apart_it_is_what_was_written() -> None:
    assert error(dict(inductor_settings())) < 1e-5
    assert counters["inductor"]["fuse_attention"] == 0


def test_the_users_own_passes_still_run() -> None:
    seen: list[str] = []
    before, after = partial(seen.append, "before"), partial(seen.append, "after")
    with torch._inductor.config.patch(
        joint_custom_pre_pass=lambda graph: before(), joint_custom_post_pass=lambda graph: after()
    ):
        assert error(dict(inductor_settings())) < 1e-5
    assert seen == ["before", "after"]


@pytest.mark.inductor
@pytest.mark.parametrize("train", [False, True])
def test_declined_attention_is_right_through_inductor(train: bool) -> None:
    given = [x.requires_grad_(train) for x in operands()]
    model = Beside()
    with torch.set_grad_enabled(train):
        expected = model(*given)
        found = ringfx.optimize(model, compiler="inductor")(*given)
    torch.testing.assert_close(found, expected)
    if train:
        gradients = [torch.autograd.grad(y.square().sum(), given) for y in (found, expected)]
        torch.testing.assert_close(*gradients)
