"""Gradients are complete on every rank, however a training loop makes and uses them."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ringfx
from ringfx.passes.rewrite import parameters
from tests.end_to_end.models import PlainTransformer, plain, tokens
from tests.support.harness import RankPool, gradient_differences
from tests.support.recorded import recorded

pytestmark = pytest.mark.ranks

SEQ_LEN = 29
EXACT = 1e-12
"""All of this is in float64, where only the order of sums differs."""

Trio = tuple[nn.Module, nn.Module, Any]


def trio(factory: Callable[[], nn.Module] | None = None, compiler: Any = "eager") -> Trio:
    """A stock model, its equal, and the latter optimized."""
    stock = (factory or plain())().double()
    source = copy.deepcopy(stock)
    return stock, source, ringfx.optimize(source, compiler=compiler)


def loss_of(model: Callable[..., Any], seed: int = 0, seq_len: int = SEQ_LEN) -> torch.Tensor:
    drawn = tokens(seq_len, 2, seed=seed)
    loss: torch.Tensor = model(drawn, drawn)[0]
    return loss


def difference(ours: nn.Module, stock: nn.Module) -> float:
    found = {name: p.grad for name, p in ours.named_parameters()}
    expected = {name: p.grad for name, p in stock.named_parameters()}
    return max(gradient_differences(found, expected).values())


# --- gradient accumulation ----------------------------------------------------------------------


def holding_back() -> tuple[float, float, Counter[str], Counter[str]]:
    stock, source, model = trio()
    for seed in range(4):
        loss_of(stock, seed).backward()
    loss_of(model, 0).backward()  # complete, and must stay so
    first = [p.grad.clone() for p in source.parameters() if p.grad is not None]
    with recorded() as held, model.no_sync():
        loss_of(model, 1).backward()
        loss_of(model, 2).backward()
    kept = [p.grad for p in source.parameters() if p.grad is not None]
    changed = max(float((a - b).abs().max()) for a, b in zip(first, kept, strict=True))
    with recorded() as sent:
        loss_of(model, 3).backward()
    return difference(source, stock), changed, Counter(held), Counter(sent)


@pytest.mark.parametrize("ranks", ["ranks2", "ranks3"])
def test_gradients_held_back_are_summed_once_by_the_next_backward(
    ranks: str, request: pytest.FixtureRequest
) -> None:
    pool: RankPool = request.getfixturevalue(ranks)
    for found, changed, held, sent in pool.run(holding_back):
        assert found < EXACT
        assert changed == 0.0
        assert held["begin_sum"] == 0
        assert sent["begin_sum"] == 1


def held_back_at_other_lengths() -> float:
    """Each length is a program of its own."""
    stock, source, model = trio()
    for seed in range(3):
        loss_of(stock, seed, SEQ_LEN + seed).backward()
    with model.no_sync():
        loss_of(model, 0, SEQ_LEN).backward()
        loss_of(model, 1, SEQ_LEN + 1).backward()
    loss_of(model, 2, SEQ_LEN + 2).backward()
    return difference(source, stock)


class TwoTowers(PlainTransformer):
    """Which of its heads is used depends on the call."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(48, 96, bias=False)
        self.use_other = False

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        if self.use_other:
            self.head, self.other = self.other, self.head
        result = super().forward(input_ids, labels)
        if self.use_other:
            self.head, self.other = self.other, self.head
        return result


def held_back_where_the_next_backward_does_not_reach() -> float:
    stock, source, model = trio(_two_towers)
    for use_other in (True, False):
        stock.use_other = use_other  # type: ignore[assignment]
        loss_of(stock).backward()
    model.use_other = True
    with model.no_sync():
        loss_of(model).backward()
    model.use_other = False
    loss_of(model).backward()
    return difference(source, stock)


def _two_towers() -> nn.Module:
    torch.manual_seed(7)
    return TwoTowers()


class TwoHeads(TwoTowers):
    """Both heads are computed in one program; a loss may use only one."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        found: list[torch.Tensor] = []
        hook = self.head.register_forward_hook(lambda _, given, __: found.append(given[0]))
        result = super().forward(input_ids, labels)
        hook.remove()
        return (*result, self.other(found[0]).square().mean())


def _two_heads() -> nn.Module:
    torch.manual_seed(7)
    return TwoHeads()


def where_the_loss_does_not_reach() -> float:
    """None where the unsplit program has none: an optimizer leaves such a parameter alone."""
    stock, source, model = trio(_two_heads)
    loss_of(stock).backward()
    loss_of(model).backward()
    assert stock.other.weight.grad is None  # type: ignore[union-attr]
    return difference(source, stock)


def held_back_where_the_next_loss_does_not_reach() -> float:
    stock, source, model = trio(_two_heads)
    drawn = tokens(SEQ_LEN, 2, seed=0)
    with model.no_sync():
        for called in (stock, model):
            *_, first = called(drawn, drawn)
            first.backward()
    loss_of(stock).backward()
    loss_of(model).backward()
    return difference(source, stock)


def cleared_by_zero_grad(set_to_none: bool) -> float:
    stock, source, model = trio()
    loss_of(stock, 1).backward()
    with model.no_sync():
        loss_of(model, 0).backward()
    source.zero_grad(set_to_none=set_to_none)
    loss_of(model, 1).backward()
    return difference(source, stock)


def summed_by_the_backward_of_an_earlier_call() -> float:
    stock, source, model = trio()
    (loss_of(stock, 0) + loss_of(stock, 1)).backward()
    early = loss_of(model, 0)
    with model.no_sync():
        loss_of(model, 1).backward()
    early.backward()
    return difference(source, stock)


def scaled_while_held_back() -> str:
    _, source, model = trio()
    loss_of(model).backward()
    with model.no_sync():
        loss_of(model).backward()
    nn.utils.clip_grad_norm_(source.parameters(), 0.01)
    try:
        loss_of(model).backward()
    except ringfx.RingfxError as error:
        return str(error)
    return ""


def test_scaling_gradients_while_parts_are_held_back_is_an_error(ranks2: RankPool) -> None:
    for text in ranks2.run(scaled_while_held_back):
        assert "changed in place while no_sync() held parts of them back" in text
        assert "Do: run one backward outside" in text


# --- training loops -----------------------------------------------------------------------------


def trained(name: str) -> float:
    """The worst relative difference of a weight after some clipped steps."""
    stock, source, model = trio()
    for called in (stock, model):
        optimizer = OPTIMIZERS[name](called.parameters())
        for seed in range(4):
            optimizer.zero_grad()
            loss_of(called, seed).backward()
            nn.utils.clip_grad_norm_(called.parameters(), 0.5)
            optimizer.step()
    with torch.no_grad():
        pairs = zip(source.parameters(), stock.parameters(), strict=True)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


class Outside(nn.Module):
    """Float inputs that want gradients, and two results for two losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = self.project(x).unflatten(-1, (2, 4)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        y = mixed.transpose(1, 2).flatten(2)
        return y * scale + self.weight, y.mean(1) * self.weight


def vectors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(s, generator=generator).double() for s in ((2, 17, 8), (8,))]
    return [x.requires_grad_() for x in drawn]


def of_inputs() -> float:
    stock, source, model = trio(Outside)
    found = []
    for called in (stock, model):
        inputs = vectors()
        first, second = called(*inputs)
        (first.square().sum() + second.sum()).backward()
        found.append([x.grad for x in inputs])
    worst = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    return max(worst, difference(source, stock))


def of_two_losses_in_turn() -> float:
    stock, source, model = trio(Outside)
    for called in (stock, model):
        first, second = called(*vectors())
        first.square().sum().backward(retain_graph=True)
        second.sum().backward()
    return difference(source, stock)


def asked_for_by_name() -> float:
    stock, _, model = trio(Outside)
    found = []
    for called in (stock, model):
        first, second = called(*vectors())
        total = first.square().sum() + second.sum()
        found.append(torch.autograd.grad(total, list(called.parameters())))
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def of_tied_weights() -> float:
    stock, source, model = trio(_tied)
    loss_of(stock).backward()
    loss_of(model).backward()
    return difference(source, stock)


def _tied() -> nn.Module:
    model = plain()()
    model.head.weight = model.embed.weight  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize(
    "function",
    [
        held_back_at_other_lengths,
        held_back_where_the_next_backward_does_not_reach,
        where_the_loss_does_not_reach,
        held_back_where_the_next_loss_does_not_reach,
        functools.partial(cleared_by_zero_grad, True),
        functools.partial(cleared_by_zero_grad, False),
        summed_by_the_backward_of_an_earlier_call,
        functools.partial(trained, "SGD"),
        functools.partial(trained, "AdamW"),
        of_inputs,
        of_two_losses_in_turn,
        asked_for_by_name,
        of_tied_weights,
    ],
    ids=lambda f: getattr(f, "__name__", "") or f"{f.func.__name__}-{f.args[0]}",
)
def test_gradients_are_the_unsplit_models(ranks3: RankPool, function: Callable[[], float]) -> None:
    """Adam divides by what is nearly zero in theory, hence its bound."""
    bound = 1e-8 if "AdamW" in getattr(function, "args", ()) else EXACT
    assert max(ranks3.run(function)) < bound


# --- messages -----------------------------------------------------------------------------------


class Recomputed(PlainTransformer):
    """Blocks that gather and sum over tokens, checkpointed or not."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            run = functools.partial(_moving, block)
            x = checkpoint(run, x, use_reentrant=False) if self.recompute else run(x)
        return (self.head(x).square().mean(),)


def _moving(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = block(x.sort(1).values * 0.1) - x.mean(1, keepdim=True)
    return result


def _recomputed(recompute: bool) -> nn.Module:
    torch.manual_seed(7)
    return Recomputed(recompute)


def messages_of_a_step(recompute: bool, compiler: str) -> tuple[float, Counter[str]]:
    stock, source, model = trio(functools.partial(_recomputed, recompute), compiler)
    loss_of(stock).backward()
    loss_of(model).backward()
    with recorded() as sent:
        loss_of(model).backward()
    source.zero_grad()
    loss_of(model).backward()
    return difference(source, stock), Counter(sent)


def test_recomputing_a_block_sends_nothing_again(ranks2: RankPool) -> None:
    with_checkpoints = ranks2.run(messages_of_a_step, True, "aot_eager")
    without = ranks2.run(messages_of_a_step, False, "aot_eager")
    for (found, sent), (_, expected) in zip(with_checkpoints, without, strict=True):
        assert found < EXACT
        assert expected["all_gather"] > 0
        assert expected["hop"] > 0
        assert sent == expected


def order_of_messages(compiler: str) -> tuple[list[str], int, int]:
    """In backward, with a bucket for nearly every parameter; and what the plan says of them."""
    smallest, parameters.SMALLEST_BUCKET = parameters.SMALLEST_BUCKET, 1
    try:
        _, _, model = trio(compiler=compiler)
        loss_of(model).backward()
    finally:
        parameters.SMALLEST_BUCKET = smallest
    loss = loss_of(model)
    with recorded() as sent:
        loss.backward()
    total = sum(m.num_bytes for m in sent if m == "begin_sum")
    planned = [m for m in model.plan.collectives if m.in_backward]
    assert len(planned) == sum(m == "begin_sum" for m in sent)
    return [str(m) for m in sent], total, sum(m.bytes_moved for m in planned)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_gradients_travel_while_backward_goes_on(ranks2: RankPool, compiler: str) -> None:
    """Sums begin between the hops of attention's backward, and are waited for after the last."""
    for sent, num_bytes, planned in ranks2.run(order_of_messages, compiler):
        hops = [i for i, m in enumerate(sent) if m == "hop"]
        begun = [i for i, m in enumerate(sent) if m == "begin_sum"]
        ended = [i for i, m in enumerate(sent) if m == "finish_sum"]
        assert len(begun) == len(ended) > 4
        assert begun[0] < hops[0]
        assert hops[0] < begun[len(begun) // 2] < hops[-1]
        assert ended[0] > max(begun[-1], hops[-1])
        assert num_bytes == planned


@pytest.mark.slow
@pytest.mark.inductor
def test_gradients_travel_while_backward_goes_on_under_inductor(ranks2: RankPool) -> None:
    test_gradients_travel_while_backward_goes_on(ranks2, "inductor")


def test_a_gather_for_shared_use_sends_back_only_its_share(ranks2: RankPool) -> None:
    """Every rank works on its own tokens of the sum, so the gradient is scattered, not reduced."""
    for found, sent in ranks2.run(gathered_for_shared_use):
        assert found < EXACT
        assert sent["reduce_scatter"] >= 1


class Memory(PlainTransformer):
    """Each token looks another one up: a rank needs all of them for its own tokens."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        x = self.blocks[0](self.embed(input_ids))
        looked = F.embedding(input_ids % input_ids.shape[1], x[0])
        return (self.head(self.blocks[1](x + looked * 0.1)).square().mean(),)


def _memory() -> nn.Module:
    torch.manual_seed(7)
    return Memory()


def gathered_for_shared_use() -> tuple[float, Counter[str]]:
    stock, source, model = trio(_memory)
    loss_of(stock).backward()
    with recorded() as sent:
        loss_of(model).backward()
    return difference(source, stock), Counter(sent)
