"""``dynamic=True``: a few programs serve all lengths, and each length is the unsplit model's."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringfx
from ringfx.passes.chunks import sizes
from tests.end_to_end.models import llama, plain, tokens
from tests.support.harness import RankPool, gradient_differences

pytestmark = pytest.mark.ranks

Tensor = torch.Tensor


class Attention(nn.Module):
    """One layer; ``mask`` says which pairs count."""

    def __init__(self, hidden: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        batch, length, hidden = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        found: Tensor = x + self.out(y.transpose(1, 2).reshape(batch, length, hidden))
        return found


class Model(nn.Module):
    def __init__(self, body: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = body
        self.attention, self.last = Attention(), Attention()
        self.first = nn.Parameter(torch.randn(1, 1, 24))
        self.positions = nn.Embedding(512, 24)
        self.head = nn.Linear(24, 7)
        self.register_buffer("causal", torch.ones(128, 128, dtype=torch.bool).tril())
        self.causal: Tensor

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(self, x)
        return found


def in_front(model: Model, x: Tensor) -> Tensor:
    """A token in front, so that the line is longer than the input; means over tokens."""
    x = torch.cat([model.first.expand(x.shape[0], 1, -1), x], 1)
    x = x + model.positions(torch.arange(x.shape[1], device=x.device))
    x = model.attention(x)
    return model.head(x[:, 0]) + model.head(x.mean(1)) + model.head(x[:, : x.shape[1] - 4].mean(1))


def windowed(model: Model, x: Tensor) -> Tensor:
    """A window that is wider than some of the lengths."""
    at = torch.arange(x.shape[1], device=x.device)
    near = (at[:, None] >= at[None]) & (at[:, None] - at[None] < 30)
    return model.head(model.last(model.attention(x, near), near))


def branching(model: Model, x: Tensor) -> Tensor:
    """Another program from a length on; a mask that the model keeps, cut to the length."""
    length = x.shape[1]
    x = model.attention(x, model.causal[:length, :length])
    return model.head(model.last(x) if length > 40 else x.tanh())


def remainders(model: Model, x: Tensor) -> Tensor:
    """Reads the length in ways that are no multiple of it."""
    length = x.shape[1]
    x = model.attention(x) * (1 + length % 5)
    return model.head(x) + model.head(x[:, length // 3]).unsqueeze(1)


def sixteenth(model: Model, x: Tensor) -> Tensor:
    """Computes with a number that does not change between lengths that are near each other."""
    return model.head(model.attention(x) * (2 + x.shape[1] // 16))


def scaled(model: Model, x: Tensor) -> Tensor:
    """Attention as sharp as the length asks for."""
    return model.head(model.attention(x, scale=math.log(x.shape[1]) / 9))


def masked(model: Model, x: Tensor) -> Tensor:
    """A mask that is computed from the input."""
    return model.head(model.attention(x, (x[..., 0] < 0.8)[:, None, None]).relu())


BODIES = {
    f.__name__: f
    for f in (
        in_front, windowed, branching, remainders, sixteenth, scaled, masked
    )
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Found:
    worst: float
    """Of all lengths' outputs, losses and gradients, as relative differences."""
    programs: int
    said: tuple[str, ...]


def inputs_of(name: str, length: int) -> dict[str, Tensor]:
    if name in BODIES:
        torch.manual_seed(length)
        return {"x": torch.randn(2, length, 24, dtype=torch.float64)}
    ids = tokens(length, 2)
    if name == "plain":
        return {"input_ids": ids, "labels": ids}
    mask = torch.ones_like(ids)
    mask[1, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def model_of(name: str) -> nn.Module:
    if name in BODIES:
        return Model(BODIES[name])
    return (plain() if name == "plain" else llama())()


def loss_and_outputs(model: nn.Module, given: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    found = model(**given)
    if isinstance(found, Tensor):
        return found.square().mean(), [found]
    return found[0], [found[1]]


def over_lengths(name: str, lengths: Sequence[int], options: Mapping[str, Any]) -> Found:
    torch._dynamo.reset()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ringfx").addHandler(handler)
    stock = model_of(name).double()
    mine = copy.deepcopy(stock)
    model: Any = ringfx.optimize(mine, dynamic=True, **options)
    worst = 0.0
    for length in lengths:
        results, grads = [], []
        for call, owner in ((stock, stock), (model, mine)):
            owner.zero_grad()
            loss, outputs = loss_and_outputs(call, inputs_of(name, length))
            loss.backward()
            results.append([x.detach().clone() for x in (loss, *outputs)])
            grads.append({n: p.grad for n, p in owner.named_parameters()})
        pairs = zip(*results, strict=True)
        worst = max(worst, *(float((a - b).abs().max() / a.abs().max()) for a, b in pairs))
        worst = max(worst, *gradient_differences(grads[1], grads[0]).values())
    logging.getLogger("ringfx").removeHandler(handler)
    return Found(worst=worst, programs=model._ringfx_shared.backend.compilations, said=tuple(said))


LENGTHS = (20, 45, 21, 32, 61)
"""Whole chunks of tokens on each of two ranks, and none; above and below what models ask for."""
OWN = "dynamic=True: a program is captured and compiled for each length"
FORMS = "one program cannot serve a range of lengths here"


@dataclass(frozen=True, kw_only=True)
class Expected:
    programs: int
    said: str = ""
    lengths: Sequence[int] = LENGTHS


EXPECTED: Mapping[str, Expected] = {
    "in_front": Expected(programs=2),
    "windowed": Expected(programs=4),
    "branching": Expected(programs=3, lengths=(125, *LENGTHS)),
    "remainders": Expected(programs=2, said=FORMS, lengths=(20, 45)),
    "sixteenth": Expected(programs=2, lengths=(20, 32, 40)),
    "scaled": Expected(programs=2, said=OWN, lengths=(20, 45)),
}


def test_lengths_share_programs_and_each_is_the_unsplit_models(ranks2: RankPool) -> None:
    for name, expected in EXPECTED.items():
        for found in check(ranks2, name, {"compiler": "eager"}, expected.lengths):
            assert (name, found.programs) == (name, expected.programs)
            announced = [x for x in found.said if x.startswith((OWN, FORMS))]
            assert len(announced) == bool(expected.said), found.said
            assert all(x.startswith(expected.said) for x in announced)


@pytest.mark.slow
def test_three_ranks(ranks3: RankPool) -> None:
    for found in check(ranks3, "in_front", {"compiler": "eager"}, (18, 19, 31, 36)):
        assert found.programs == 2


@pytest.mark.slow
def test_a_hugging_face_model_with_padding_on_three_ranks(ranks3: RankPool) -> None:
    lengths = (18, 19, 31, 36)
    for found in check(ranks3, "llama", {"compiler": "eager"}, lengths, at_most=1e-6):
        assert found.programs == 2


def test_sizes_are_symbols_for_a_compiler(ranks2: RankPool) -> None:
    for found in check(ranks2, "masked", {"compiler": "aot_eager"}, (45, 21, 39)):
        assert found.programs == 1


@pytest.mark.slow
def test_sizes_are_symbols_for_inductor(ranks2: RankPool) -> None:
    for found in check(ranks2, "plain", {"compiler": "inductor"}, (45, 21, 39)):
        assert found.programs == 1


def of_a_wide_loss() -> Found:
    sizes.BYTES, given = {"cpu": 1}, sizes.BYTES
    try:
        return over_lengths("plain", (160, 176), {"compiler": "eager"})
    finally:
        sizes.BYTES = given


def test_what_does_not_run_in_chunks_for_it_is_announced(ranks2: RankPool) -> None:
    for found in ranks2.run(of_a_wide_loss):
        assert found.worst < 1e-10
        assert found.programs == 1
        assert sum("not run in chunks of tokens, so that one program" in x for x in found.said) == 1


def by_torch_compile(dynamic: bool | None) -> tuple[float, int]:
    """How far off, and how many programs of one model there are."""
    torch._dynamo.reset()
    made = Counted()
    logging.getLogger("ringfx").addHandler(made)
    logging.getLogger("ringfx").setLevel("INFO")
    stock = model_of("plain")
    model = torch.compile(
        copy.deepcopy(stock), backend="ringfx", options={"compiler": "eager"}, dynamic=dynamic
    )
    worst = 0.0
    with torch.no_grad():
        for length in (21, 27, 45):
            ids = tokens(length, 2)
            worst = max(worst, float((model(ids) - stock(ids)).abs().max()))
    logging.getLogger("ringfx").removeHandler(made)
    return worst, made.programs


class Counted(logging.Handler):
    programs = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.programs += record.getMessage().startswith("compiles program")


@pytest.mark.parametrize(("dynamic", "expected"), [(True, 1), (None, 2)])
def test_torch_compile_asks_for_it_in_its_own_way(
    ranks2: RankPool, dynamic: bool | None, expected: int
) -> None:
    """By default it leaves a length open when it has seen a second one."""
    for worst, programs in ranks2.run(by_torch_compile, dynamic):
        assert worst < 1e-4
        assert programs == expected


def check(
    pool: RankPool,
    name: str,
    options: Mapping[str, Any],
    lengths: Sequence[int],
    at_most: float = 1e-10,
) -> list[Found]:
    found: list[Found] = pool.run(over_lengths, name, lengths, options)
    assert all(x.worst < at_most for x in found), (name, found)
    return found
