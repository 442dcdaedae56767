"""In-place operators keep their meaning beyond what the conformance table holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ringfx
from ringfx.errors import CaptureRefused
from ringfx.passes.capture.overloads import functional_overload
from tests.models.constructs import Around, total
from tests.models.shapes import HIDDEN
from tests.models.writes import BUFFERS, WRITES, Writes, WritesBuffers
from tests.support.harness import Case, compare_here
from tests.support.programs import captured

Tensor = torch.Tensor
aten = torch.ops.aten
SEQ_LEN = 7


def x() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, SEQ_LEN, HIDDEN, generator=generator).requires_grad_(),)


def case(label: str, compiler: str = "eager", **more: Any) -> Case:
    model: Callable[[], Around] = functools.partial(
        Writes if label in WRITES else WritesBuffers, label
    )
    fields: dict[str, Any] = {"steps": 2 if label in BUFFERS else 1} | more
    return Case(
        model=model, inputs=x, dtype=torch.float64, loss=total, options={"compiler": compiler},
        label=label, **fields,
    )  # fmt: skip


@pytest.mark.parametrize("label", ["overlapping views", "a running mean", "BatchNorm"])
def test_a_write_keeps_its_gradient_through_autograd_of_the_compiler(label: str) -> None:
    compare_here(case(label, "aot_eager")).check()


def test_without_gradients_a_cache_is_written_in_place() -> None:
    compare_here(case("a cache written by slice", backward=False)).check()


def test_no_write_is_left_in_the_program() -> None:
    program = captured(WritesBuffers("a cache written by slice"), *x())
    calls = [n for n in program.graph_module.graph.nodes if n.op == "call_function"]
    written = [n for n in calls if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    assert not written
    (place,) = program.writes
    assert program.input_names[place] == "cache"
    assert all(n.meta["ringfx_source"] for n in calls)


def test_a_shift_to_the_right_is_two_functional_calls() -> None:
    program = captured(Writes("shifted to the right"), *x())
    targets = [n.target for n in program.graph_module.graph.nodes]
    assert targets.count(aten.slice_scatter.default) == 1
    assert aten.where.self in targets


class WritesInput(Around):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.last(self.first(x))


class WritesAndReturnsInput(Around):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        y = self.last(self.first(x * 2))
        x[:, :2] += 1
        return x, y, x[:, 1:]


@pytest.mark.parametrize("model", [WritesInput, WritesAndReturnsInput])
def test_an_input_is_written_as_the_model_writes_it(model: type[Around]) -> None:
    def inputs() -> tuple[Tensor, ...]:
        return (x()[0].detach(),)

    settings: dict[str, Any] = {"dtype": torch.float64, "loss": total}
    compare_here(
        Case(model=model, inputs=inputs, options={"compiler": "eager"}, **settings)
    ).check()


def test_what_the_model_returns_is_the_tensor_that_it_wrote() -> None:
    given = x()[0].detach()
    returned = ringfx.optimize(WritesAndReturnsInput(), compiler="eager")(given)
    assert returned[0] is given


class TwoInputs(Around):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        x.mul_(2)
        return self.last(self.first(x)) + y


def test_memory_that_is_given_twice_is_not_written() -> None:
    given = x()[0].detach()
    with pytest.raises(CaptureRefused, match="share the memory it writes into"):
        ringfx.optimize(TwoInputs(), compiler="eager")(given, given[:, :, :1])


@pytest.mark.parametrize(
    ("written", "functional"),
    [
        (aten.add_.Tensor, aten.add.Tensor),
        (aten.bernoulli_.float, aten.bernoulli.p),
        (aten.normal_.default, aten.normal_functional.default),
        (aten.__ior__.Tensor, aten.__or__.Tensor),
        (aten.mul.out, aten.mul.Tensor),
        (aten.set_.source_Tensor, None),
        (aten.resize_.default, None),
    ],
)
def test_the_functional_form_has_the_same_arguments(written: Any, functional: Any) -> None:
    assert functional_overload(written) == functional
