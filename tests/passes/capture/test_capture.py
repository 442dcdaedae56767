"""What captured programs are made of; docs/capture.md and its table hold the constructs."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import ringfx
from ringfx.errors import CaptureRefused, RingfxError
from ringfx.passes.axes.rules import find_rule
from ringfx.passes.capture import capture
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.capture.losses import LOSS_DECOMPOSITIONS
from tests.models import constructs, torch_layers
from tests.models.constructs import total
from tests.models.shapes import HIDDEN
from tests.support.harness import Case, compare_here
from tests.support.programs import captured, lowered
from tests.support.sampling import one_in

SEQ_LEN = 7
Tensor = torch.Tensor


def x() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, SEQ_LEN, HIDDEN, generator=generator).requires_grad_(),)


def alike(model: Callable[[], nn.Module], inputs: Callable[[], Any] = x, **more: Any) -> None:
    fields: dict[str, Any] = {"dtype": torch.float64, "loss": total, "options": EAGER} | more
    compare_here(Case(model=model, inputs=inputs, **fields)).check()


EAGER = {"compiler": "eager"}
AOT = {"compiler": "aot_eager"}


@pytest.mark.parametrize(
    "model",
    [
        constructs.Nested,
        constructs.NoGrad,
        constructs.Selective,
        constructs.OwnBackwards,
        constructs.StraightThrough,
    ],
)
def test_carried_through_autograd_of_the_compiler(model: Callable[[], nn.Module]) -> None:
    alike(model, options=AOT)


def no_policy() -> Any:
    return contextlib.nullcontext(), contextlib.nullcontext()


class OwnContext(constructs.Around):
    """A context_fn that is no selective checkpointing."""

    def between(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.first, x, use_reentrant=False, context_fn=no_policy)
        return result


def test_another_context_fn_is_refused() -> None:
    with pytest.raises(Exception, match="not selective checkpointing") as caught:
        ringfx.optimize(OwnContext(), compiler="eager")(*x())
    assert isinstance(caught.value, RingfxError)


def test_a_policy_says_which_calls_are_saved() -> None:
    """It speaks of aten.mm, which linear layers become."""
    program = captured(constructs.Selective(), *x())
    wishes: dict[Any, set[Any]] = {}
    for node in program.graph_module.graph.nodes:
        if "recompute" in node.meta:
            wishes.setdefault(node.target, set()).add(node.meta["recompute"])
    aten = torch.ops.aten
    assert wishes[aten.layer_norm.default] == {CheckpointPolicy.PREFER_RECOMPUTE}
    assert wishes[aten.gelu.default] == {CheckpointPolicy.PREFER_RECOMPUTE}


def test_a_function_whose_backward_does_more_than_sum_has_whole_rows_of_tokens() -> None:
    program = lowered(constructs.OwnBackwards(), *x())
    kinds = [m.kind for m in program.plan.collectives if not m.in_backward]
    assert set(kinds) == {"all_to_all"}
    assert not any(" at 0x" in m.reason for m in program.plan.collectives)  # ranks compare plans


def test_a_checkpointed_body_is_recomputed_but_attention_is_not_lost() -> None:
    program = captured(constructs.Checkpointed(), *x())
    nodes = [n for n in program.graph_module.graph.nodes if n.op == "call_function"]
    assert all("recompute" in n.meta for n in nodes if n.target is torch.ops.aten.linear.default)
    regions = {n.meta["ac_graph_id"] for n in nodes if "ac_graph_id" in n.meta}
    assert len(regions) == 2
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    assert sum(n.target is sdpa for n in nodes) == 2


def test_work_grows_with_the_depth_of_checkpoints_and_not_in_powers_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walks = Counter[int]()
    depth = 0
    usual = torch.fx.GraphModule.named_modules

    def counted(self: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        walks[depth] += 1
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(torch.fx.GraphModule, "named_modules", counted)
    for depth in (4, 8, 12):
        captured(constructs.Deep(depth), *x())
    assert walks[12] - walks[8] <= 4 * (walks[8] - walks[4])  # in powers of two: 16


def test_gradients_are_marked_where_they_flow() -> None:
    program = captured(constructs.NoGrad(), *x())
    graph = program.graph_module.graph
    by_target: dict[Any, list[bool]] = {}
    for node in graph.nodes:
        by_target.setdefault(node.target, []).append(needs_grad(node))
    aten = torch.ops.aten
    assert by_target[aten.rsqrt.default] == [False]
    assert by_target[aten.tanh.default] == [False]
    attentions = by_target[aten.scaled_dot_product_attention.default]
    assert attentions == [True, False, True]


def test_nodes_know_their_module_and_their_line() -> None:
    program = captured(torch_layers.EncoderLayer(), *x())
    graph = program.graph_module.graph
    (node,) = (
        n for n in graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default
    )
    assert node.meta["ringfx_path"] == "layer.self_attn"
    assert node.meta["ringfx_source"].startswith("torch_layers.py:")
    calls = [n for n in graph.nodes if n.op == "call_function"]
    assert all(n.meta["ringfx_source"] for n in calls)
    assert "layer.self_attn.in_proj_weight" in program.input_names
    assert "x" in program.input_names


def classes(ignored: float = 0.3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(0, HIDDEN, (2, SEQ_LEN), generator=generator)
    target[torch.rand(2, SEQ_LEN, generator=generator) < ignored] = 5
    return {"x": x()[0], "target": target}


def weighted() -> dict[str, Any]:
    return classes() | {"weight": torch.rand(HIDDEN) + 0.5}


def default_ignored() -> dict[str, Any]:
    given = classes()
    return given | {"target": given["target"].where(given["target"] != 5, -100)}


def probabilities() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    target = torch.rand(2, HIDDEN, SEQ_LEN, generator=generator).softmax(1)
    return {"x": x()[0], "target": target}


def distributions() -> dict[str, Any]:
    return {"x": x()[0], "target": values()["target"].softmax(-1)}


def values() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {"x": x()[0], "target": torch.randn(2, SEQ_LEN, HIDDEN, generator=generator)}


entropy = functools.partial(constructs.loss, "cross_entropy")
LOSSES: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    **{
        f"cross entropy, {reduction}": (entropy(reduction=reduction), classes)
        for reduction in ("none", "mean", "sum")
    },
    "an ignored class": (entropy(ignore_index=5), classes),
    "the default ignored class": (entropy(), default_ignored),
    "class weights": (entropy(), weighted),
    "class weights and an ignored class": (entropy(ignore_index=5), weighted),
    "label smoothing": (entropy(label_smoothing=0.1), classes),
    "label smoothing, an ignored class": (
        entropy(label_smoothing=0.1, ignore_index=5), classes
    ),
    "label smoothing and class weights": (
        entropy(label_smoothing=0.1, ignore_index=5), weighted
    ),
    "class probabilities": (entropy(), probabilities),
    "class probabilities, weights": (
        entropy(label_smoothing=0.1), lambda: probabilities() | {"weight": torch.rand(HIDDEN)}
    ),
    **{
        f"{kind}, {reduction}": (constructs.loss(kind, reduction=reduction), values)
        for kind in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
        for reduction in ("none", "mean", "sum")
    },
    "smooth l1 with beta": (constructs.loss("smooth_l1_loss", beta=0.3), values),
    "huber with delta": (constructs.loss("huber_loss", delta=0.3), values),
    "kl": (constructs.loss("kl_div", reduction="batchmean"), distributions),
    "binary cross entropy": (
        constructs.loss("binary_cross_entropy_with_logits"), values
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", one_in(3, LOSSES))
def test_losses_keep_their_value_and_gradient(name: str) -> None:
    model, inputs = LOSSES[name]
    alike(model, inputs)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [*itertools.permutations((torch.float64, torch.float32, torch.bfloat16), 2)],
)
def test_a_mean_loss_of_two_types_has_the_type_that_torch_gives_it(
    given: torch.dtype, wanted: torch.dtype
) -> None:
    x, target = torch.randn(5, 3, dtype=given), torch.rand(5, 3, dtype=wanted)
    for op in (
        torch.ops.aten.binary_cross_entropy_with_logits.default,
        torch.ops.aten.mse_loss.default,
        torch.ops.aten.soft_margin_loss.default,
    ):
        ours, theirs = LOSS_DECOMPOSITIONS[op](x, target), op(x, target)
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=0)


def test_a_mean_over_no_target_is_nan_as_in_torch() -> None:
    given = classes(ignored=1.0)
    model = entropy(ignore_index=5)()
    assert torch.isnan(model(**given))
    assert torch.isnan(ringfx.optimize(model, compiler="eager")(**given))


@pytest.mark.parametrize(
    ("dtype", "region"),
    [
        pytest.param(torch.float32, False, id="ambient"),
        pytest.param(torch.bfloat16, False, id="ambient, bfloat16 model"),
        pytest.param(torch.float32, True, id="inside the model"),
        pytest.param(torch.bfloat16, True, id="inside the model, bfloat16 model"),
    ],
)
def test_autocast_gives_the_stock_types_and_values(dtype: torch.dtype, region: bool) -> None:
    """Against the stock model under autocast: equal types, values within bfloat16's rounding."""
    torch.manual_seed(0)
    make = constructs.AutocastRegion if region else constructs.ReadBuffers
    stock = make().to(dtype)
    optimized = ringfx.optimize(stock, compiler="eager")
    ours, theirs = (autocast_step(model, stock, dtype, not region) for model in (optimized, stock))
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        if name.endswith("k.bias"):  # zero in theory: rounding alone
            continue
        scale = value.abs().max().clamp_min(1e-3 * largest)
        assert (ours[name] - value).abs().max() < 0.06 * scale, name


def autocast_step(
    model: nn.Module, owner: nn.Module, dtype: torch.dtype, ambient: bool
) -> dict[str, Tensor]:
    owner.zero_grad()
    given = x()[0].detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
        output = model(given)
    output.float().square().sum().backward()
    gradients = {n: p.grad for n, p in owner.named_parameters() if p.grad is not None}
    assert given.grad is not None
    return {"output": output.detach(), "x": given.grad, **gradients}


def test_a_size_that_is_read_from_a_tensor_is_refused_by_name() -> None:
    """Dynamo hands them on in functions that it resumes: Pixtral's grids of patches."""
    graph = torch.fx.Graph()
    value, rows = graph.placeholder("value"), graph.placeholder("rows")
    graph.output((graph.call_method("view", (value, rows, 3, 8)),))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    with pytest.raises(CaptureRefused, match="a size or a number is read from tensor values"):
        capture(gm, [torch.randn(12, 8), torch.tensor(4)], known=find_rule)
