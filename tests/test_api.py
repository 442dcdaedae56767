"""What ``ringfx.optimize`` promises at one rank, whatever the model: lengths, plans, identity."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ringfx
from ringfx.compile.backend import ringfx_backend
from ringfx.errors import InvalidArgument, VerificationError
from ringfx.ir.step_time import ELEMENTWISE
from ringfx.passes.detect.substitute import for_ringfx
from ringfx.report.detection_report import report_detection
from ringfx.torch_compat.releases import ISOLATED

LENGTHS = range(4, 16)
"""More than Dynamo's own limit of recompilations (8), after which it runs a model as it is."""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


def test_every_length_runs_its_own_plan_however_many_there_are() -> None:
    torch._dynamo.reset()
    stock = Attention()
    model: Any = ringfx.optimize(stock, compiler="eager")
    for length in (*LENGTHS, *LENGTHS):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(model(x), stock(x))
        assert [axis.length for axis in model.plan.axes] == [length]
        assert len(model.plan.layers) == 1


def test_the_model_keeps_its_class_names_and_parameters() -> None:
    stock = Attention()
    model = ringfx.optimize(stock, compiler="eager")
    assert isinstance(model, Attention)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert model.qkv.weight is stock.qkv.weight


def test_a_defect_is_the_same_named_error_from_plan_and_optimize(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("axis 3")

    monkeypatch.setattr("ringfx.compile.pipeline.place", broken)
    x = torch.randn(1, 8, 16)
    optimized: Any = ringfx.optimize(Attention(), compiler="eager")
    texts, text = [], r"KeyError .'axis 3'.* in _lowered, "
    for call in (lambda: ringfx.plan(Attention(), (x,), world_size=2), lambda: optimized(x)):
        with pytest.raises(VerificationError, match=text) as raised:
            call()
        assert isinstance(raised.value.__cause__, KeyError)
        texts.append(str(raised.value))
    assert texts[0] == texts[1]


def test_a_plan_is_asked_for_before_the_first_call() -> None:
    model: Any = ringfx.optimize(Attention(), compiler="eager")
    with pytest.raises(ringfx.RingfxError, match="has not run yet"):
        _ = model.plan


def test_a_copy_of_an_optimized_model_is_optimized_too() -> None:
    for before_the_first_call in (True, False):
        model: Any = ringfx.optimize(Attention(), compiler="eager")
        x = torch.randn(2, 5, 16)
        if not before_the_first_call:
            model(x)
        twin: Any = copy.deepcopy(model)
        torch.testing.assert_close(twin(x), model(x))
        assert len(twin.plan.layers) == 1
        assert twin.qkv.weight is not model.qkv.weight


def test_a_model_may_be_optimized_again_with_other_options() -> None:
    stock = Attention()
    first: Any = ringfx.optimize(stock, compiler="eager")
    again: Any = ringfx.optimize(first, compiler="eager", strategy="simple")
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(again(x), stock(x))
    assert [layer.strategy for layer in again.plan.layers] == ["simple"]


def test_what_torch_compile_made_is_refused() -> None:
    with pytest.raises(ringfx.errors.InvalidArgument, match="pass the original model"):
        ringfx.optimize(torch.compile(Attention()))  # type: ignore[type-var]


def test_a_call_that_nothing_compiled_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = ringfx.optimize(Attention(), compiler="eager")
    with caplog.at_level("WARNING", logger="ringfx"):
        for _ in range(2):
            torch.func.vmap(model)(torch.randn(3, 2, 5, 16))
    assert sum("ran unsharded on every rank" in r.getMessage() for r in caplog.records) == 1


def test_a_model_compiled_for_any_size_is_found_with_its_numbers_as_they_are() -> None:
    """With dynamic=True Dynamo hands floats over as tensors: an epsilon, a temperature."""
    torch._dynamo.reset()
    stock = nn.Sequential(Attention(), nn.LayerNorm(16, eps=0.5))
    whole: list[bool] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        runner = ringfx_backend(gm, example_inputs, options={"compiler": "eager"})
        calls = {getattr(node.target, "__name__", "") for node in gm.graph.nodes}
        whole.append({"layer_norm", "scaled_dot_product_attention"} <= calls)
        return runner

    for length in (5, 9):
        torch._dynamo.reset()
        model = torch.compile(stock, backend=for_ringfx(backend), dynamic=True)
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(model(x), stock(x))
    assert whole == [True, True]


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.first(x))
        return y


def test_stats_count_what_each_layer_did_and_time_it_only_when_asked() -> None:
    torch._dynamo.reset()
    ringfx.ops.reset_stats()
    model = ringfx.optimize(TwoLayers(), compiler="eager")
    x = torch.randn(2, 32, 16)
    model(x).sum().backward()
    found = ringfx.stats(model)
    assert sorted(found) == ["first", "second"]
    counts = [(s.forwards, s.backwards, s.messages, s.retries) for s in found.values()]
    assert counts == [(1, 1, 0, 0)] * 2
    assert found["first"].compute_s == 0.0
    with ringfx.ops.timed():
        model(x)
    assert ringfx.stats(model)["first"].compute_s > 0.0
    with pytest.raises(ringfx.RingfxError, match=r"does not come from ringfx\.optimize"):
        ringfx.stats(TwoLayers())


def test_another_kernel_than_the_plan_counts_on_is_announced_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    ringfx.ops.reset_stats()
    chosen = ringfx.ops.attention.__globals__["choose"]
    monkeypatch.setitem(
        ringfx.ops.attention.__globals__,
        "choose",
        lambda *where, **asked: chosen(*where, **(asked | {"math_only": True})),
    )
    model = ringfx.optimize(Attention(), compiler="eager")
    for _ in range(2):
        model(torch.randn(2, 32, 16))
    said = [r.getMessage() for r in caplog.records if "kernel" in r.getMessage()]
    assert len(said) == 1
    assert "the plan expects the cpu_flash kernel, but math ran" in said[0]


@pytest.mark.skipif(not ISOLATED, reason="this torch keeps all programs of a function in one list")
def test_planning_leaves_what_the_process_has_compiled() -> None:
    torch._dynamo.reset()
    compiled: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        compiled.append(gm)
        return gm.forward

    stock, x = Attention(), torch.randn(2, 12, 16)
    theirs: Any = torch.compile(stock, backend=backend, dynamic=False)
    theirs(x)
    for length in LENGTHS:
        ringfx.plan(stock, (torch.randn(2, length, 16),), world_size=2)
        report_detection(stock, (torch.randn(2, length, 16),))
    theirs(x)
    assert len(compiled) == 1


@pytest.mark.skipif(not ISOLATED, reason="this torch keeps all programs of a function in one list")
def test_a_function_that_torch_compile_gave_up_is_split_all_the_same() -> None:
    torch._dynamo.reset()
    stock = Attention()
    theirs: Any = torch.compile(stock, backend="eager", dynamic=False)
    for length in LENGTHS:
        theirs(torch.randn(2, length, 16))
    model: Any = ringfx.optimize(stock, compiler="eager")
    model(torch.randn(2, 20, 16))
    assert [axis.length for axis in model.plan.axes] == [20]


def test_an_optimized_model_is_planned_as_the_model_that_was_given() -> None:
    model = ringfx.optimize(Attention(), compiler="eager")
    assert len(ringfx.plan(model, (torch.randn(2, 12, 16),), world_size=2).layers) == 1


def test_a_plan_is_of_the_compiler_that_will_run_it() -> None:
    def chain_ms(compiler: Any) -> float:
        made = ringfx.plan(
            Chain(), (torch.randn(2, 12, 16),), world_size=2, profile="cpu-default",
            compiler=compiler,
        )  # fmt: skip
        assert made.step is not None
        return made.step.of(ELEMENTWISE)

    assert chain_ms("inductor") < chain_ms("aot_eager") / 2, "fused: read and written once"
    with pytest.raises(InvalidArgument, match="aot_eager"):
        chain_ms("jit")


class Chain(Attention):
    """Operators one after the other, behind attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x)
        for _ in range(8):
            y = (y * 1.5).sin()
        return y
