"""Layers that are computed again in backward give the unsplit model's results."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ringfx
from ringfx.compile.settings import Compiler
from ringfx.cost_model.choice.layers_again import Recompute
from ringfx.ir.plan import Plan
from tests.end_to_end.test_chunks import inputs, loss_of
from tests.models.wide import Block, WideModel
from tests.support.harness import Case, RankPool, compare_all
from tests.support.sampling import one_in


def case(seq_len: int, compiler: str = "aot_eager", **options: Any) -> Case:
    return Case(
        model=WideModel,
        inputs=functools.partial(inputs, seq_len),
        loss=loss_of,
        dtype=torch.float64,
        options={"compiler": compiler, "recompute": "layers", **options},
        label=f"{seq_len} tokens, {compiler}, {options}",
    )


EVERY: tuple[dict[str, Any], ...] = (
    {}, {"chunks": 4}, {"chunks": "none", "strategy": "simple"}, {"strategy": "ulysses"},
    {"strategy": "collective"}, {"head_groups": 2}, {"recompute": "attention"},
    {"recompute": "attention", "strategy": "simple"},
    {"recompute": "attention", "strategy": "ulysses", "chunks": 4},
)  # fmt: skip


@pytest.mark.parametrize("seq_len", one_in(2, [61, 24]))
def test_every_lever_beside_it_is_right_on_two_ranks(ranks2: RankPool, seq_len: int) -> None:
    some = one_in(2, EVERY if seq_len == 24 else EVERY[1:])
    for found in compare_all(ranks2, [case(seq_len, **options) for options in some]):
        found.check()


@pytest.mark.slow
def test_they_are_right_on_three_ranks(ranks3: RankPool) -> None:
    for found in compare_all(ranks3, [case(62, **options) for options in EVERY[:3]]):
        found.check()


@pytest.mark.slow
@pytest.mark.inductor
def test_compiled_by_inductor_they_are_right(ranks2: RankPool) -> None:
    for found in compare_all(ranks2, [case(61, "inductor"), case(61, "inductor", chunks=4)]):
        found.check()


class Dropping(nn.Module):
    """Dropout outside attention, in every layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(32, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.dropout(block(F.dropout(x, 0.3)), 0.2)
        return x.square().mean()


def gradients(recompute: Recompute, compiler: Compiler) -> list[Tensor]:
    model = Dropping()
    split = ringfx.optimize(model, recompute=recompute, compiler=compiler)
    given = torch.linspace(-1, 1, 2 * 24 * 32).view(2, 24, 32)
    torch.manual_seed(3)
    split(given).backward()
    plan: Plan = getattr(split, "plan")  # noqa: B009
    assert sum(layer.recomputed for layer in plan.layers) == 3 * (recompute == "layers")
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_dropout_drops_the_same_again(ranks2: RankPool) -> None:
    """Other numbers would give other gradients than those of kept layers."""
    for found in ranks2.run(dropping_twice):
        assert found < 1e-6


def dropping_twice() -> float:
    pairs = zip(gradients("none", "aot_eager"), gradients("layers", "aot_eager"), strict=True)
    return max(float((a - b).norm() / a.norm().clamp(min=1e-12)) for a, b in pairs)


def kept_of_a_step(recompute: Recompute) -> int:
    """Bytes that compiled programs keep of a forward pass, parameters apart; exact anywhere."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(32, 4) for _ in range(6)))
    split = ringfx.optimize(model, recompute=recompute, compiler="aot_eager", chunks="none")
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    loss = split(torch.randn(1, 512, 32)).square().mean()
    kept: dict[int, int] = {}
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        nodes += [x for x, _ in node.next_functions if x is not None]
        for value in getattr(node, "saved_tensors", ()):
            storage = value.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
    return sum(size for where, size in kept.items() if where not in parameters)


def test_less_is_kept_for_backward(ranks2: RankPool) -> None:
    kept, again = (max(ranks2.run(kept_of_a_step, how)) for how in ("none", "layers"))
    print(again, kept)
    assert again < 0.5 * kept
