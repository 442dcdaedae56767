"""Memory of whole programs, against torch's own partitioner and against what a step took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ringfx
from benchmarks.prediction_memory import peak_bytes
from ringfx.api import offline
from ringfx.compile import pipeline
from ringfx.cost_model.peak_memory.liveness import kept_values, values_of
from ringfx.cost_model.peak_memory.peak import predict_memory
from ringfx.errors import InvalidArgument, OutOfMemory
from ringfx.ir.memory_plan import MemoryPlan
from ringfx.ir.values import Captured
from ringfx.passes.capture.gradients import stamp_gradients

MIB = 2**20


def _captured(function: Callable[..., Any], *inputs: Tensor) -> Captured:
    graph_module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)
    stamp_gradients(graph_module.graph, [x.requires_grad for x in inputs])
    return Captured(
        graph_module=graph_module,
        input_names=tuple(f"input_{i}" for i in range(len(inputs))),
        is_parameter=tuple(x.requires_grad and x.is_leaf and x.dim() == 2 for x in inputs),
        needs_grad=tuple(x.requires_grad for x in inputs),
    )


def _predicted(captured: Captured, world_size: int = 1, split: bool = True) -> MemoryPlan:
    return predict_memory(
        captured, carries_tokens=lambda node: split, layers={}, world_size=world_size
    )


def _part(plan: MemoryPlan, cause: str) -> int:
    return sum(part.bytes for part in plan.parts if part.cause == cause)


def _mlp(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)


def _deep(x: Tensor, *weights: Tensor) -> Tensor:
    for i in range(0, len(weights), 3):
        x = _mlp(x, *weights[i : i + 3])
    return x


def _weights(num_layers: int) -> list[Tensor]:
    shapes = [(192, 64), (192, 64), (64, 192)] * num_layers
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def _attention(x: Tensor, w: Tensor) -> Tensor:
    q, k = F.linear(x, w), F.linear(x.tanh(), w)
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ x


CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "gated mlp": (_mlp, [torch.randn(512, 64, requires_grad=True), *_weights(1)]),
    "three gated mlps": (_deep, [torch.randn(512, 64, requires_grad=True), *_weights(3)]),
    "written-out attention": (
        _attention,
        [torch.randn(2, 128, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)],
    ),
}


def _kept_by_torch(function: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Bytes that torch's partitioner hands from forward to backward, inputs and views apart."""
    found: list[int] = []

    def forward(graph_module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        (output,) = graph_module.graph.find_nodes(op="output")
        results, given = set(), set(graph_module.graph.find_nodes(op="placeholder"))
        for node in output.args[0][1:]:
            while node.target in (
                torch.ops.aten.view.default,
                torch.ops.aten.t.default,
                torch.ops.aten._unsafe_view.default,
                torch.ops.aten.transpose.int,
                torch.ops.aten.expand.default,
            ):
                node = node.args[0]
            results.add(node)
        sizes = [n.meta["val"] for n in results - given]
        found.append(sum(v.numel() * v.element_size() for v in sizes if v.numel() > 1000))
        return graph_module

    compiled = aot_function(
        function,
        fw_compiler=forward,
        bw_compiler=lambda graph_module, example_inputs: graph_module,
        partition_fn=min_cut_rematerialization_partition,
    )
    compiled(*inputs).sum().backward()
    return found[0]


@pytest.mark.parametrize("name", CASES)
def test_as_much_is_kept_as_torchs_partitioner_keeps(name: str) -> None:
    function, inputs = CASES[name]
    captured = _captured(function, *inputs)
    graph = captured.graph_module.graph
    has_grad = dict(zip(graph.find_nodes(op="placeholder"), captured.needs_grad, strict=True))

    def size(node: torch.fx.Node) -> int:
        value: Tensor = node.meta["val"]
        return value.numel() * value.element_size()

    values = values_of(graph, size, has_grad)
    kept = sum(values.bytes[node] for node in kept_values(values))
    assert kept == pytest.approx(_kept_by_torch(function, inputs), rel=0.1)


def test_what_carries_tokens_is_divided_by_the_ranks_and_parameters_are_not() -> None:
    function, inputs = CASES["three gated mlps"]
    captured = _captured(function, *inputs)
    one, two = _predicted(captured), _predicted(captured, 2)
    kept = "activations saved for backward"
    assert _part(two, kept) == pytest.approx(_part(one, kept) / 2, rel=0.01)
    assert _part(two, "parameters") == _part(one, "parameters")
    assert _part(_predicted(captured, 2, split=False), kept) == _part(one, kept)


def test_gradients_are_joined_to_messages_where_there_is_someone_to_send_them_to() -> None:
    weights = [torch.randn(512, 512, requires_grad=True) for _ in range(2)]
    captured = _captured(lambda x, a, b: x @ a @ b, torch.randn(4, 512), *weights)
    assert _part(_predicted(captured, 2), "gradient buckets") == 2 * MIB
    assert _part(_predicted(captured, 1), "gradient buckets") == 0


def test_without_gradients_values_live_until_their_last_use() -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(10):
            x = x.exp()
        return x

    captured = _captured(chain, torch.randn(MIB // 4))
    plan = _predicted(captured)
    assert plan.peak_bytes == 2 * MIB
    assert plan.unknown == ()


def test_no_grad_regions_keep_nothing() -> None:
    def frozen(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            scale = (x @ w).exp().sin()
        return x * scale

    inputs = [torch.randn(512, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)]
    captured = _captured(frozen, *inputs)
    names = {node.name for node in _kept(captured)}
    assert names == {"sin"}


def _kept(captured: Captured) -> frozenset[torch.fx.Node]:
    graph = captured.graph_module.graph
    inputs = graph.find_nodes(op="placeholder")
    has_grad = dict(zip(inputs, captured.needs_grad, strict=True))
    return kept_values(values_of(graph, lambda node: 4096, has_grad))


class Small(nn.Module):
    """A decoder with a loss: attention, gated feed-forward, a vocabulary."""

    def __init__(self, width: int, layers: int, vocabulary: int, checkpoint: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(3 * width, width, bias=False) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.checkpoint = checkpoint

    def block(self, x: Tensor, i: int) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv[i](x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.transpose(1, 2).flatten(2)
        return x + self.down[i](F.silu(self.up[i](x)))  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for i in range(len(self.qkv)):
            if self.checkpoint:
                x = checkpoint(self.block, x, i, use_reentrant=False)
            else:
                x = self.block(x, i)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("width", "layers", "vocabulary", "checkpoint", "compiler"),
    [
        (128, 4, 256, False, "aot_eager"),
        (64, 2, 4000, False, "aot_eager"),
        (128, 6, 256, True, "aot_eager"),
        (128, 4, 256, True, "eager"),
    ],
)
def test_the_peak_of_a_step_is_predicted_within_15_percent(
    width: int,
    layers: int,
    vocabulary: int,
    checkpoint: bool,
    compiler: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured: list[Captured] = []
    rewrite = pipeline.rewrite
    monkeypatch.setattr(
        pipeline,
        "rewrite",
        lambda program, *args, **options: (
            captured.append(program) or rewrite(program, *args, **options)
        ),
    )
    torch.manual_seed(0)
    model = Small(width, layers, vocabulary, checkpoint)
    optimized = ringfx.optimize(model, compiler=compiler)
    ids = torch.randint(0, vocabulary, (1, 1024))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        optimized(ids, ids).backward()

    step()
    measured = peak_bytes(step)
    predicted = predict_memory(
        captured[0],
        carries_tokens=lambda node: True,
        layers={layer.site.node: layer for layer in optimized.plan.layers},
        world_size=1,
        compiler=compiler,
    )
    beyond = predicted.peak_bytes - _part(predicted, "parameters")
    assert beyond == pytest.approx(measured, rel=0.15)


def _plan(checkpoint: bool = False, **options: Any) -> ringfx.Plan:
    with offline():
        model = Small(64, 4, 256, checkpoint)
        ids = torch.empty(1, 1024, dtype=torch.int64)
    return ringfx.plan(model, (ids, ids), world_size=2, **options)


def test_checkpointed_attention_keeps_its_results_and_computes_its_inputs_again() -> None:
    whole, checkpointed = _plan(), _plan(checkpoint=True)
    assert [layer.site.checkpoint for layer in checkpointed.layers] == [1, 2, 3, 4]
    layer = whole.layers[0]
    assert whole.saved_bytes == 4 * layer.saved_bytes
    assert checkpointed.saved_bytes == 4 * layer.result_bytes
    inputs = layer.saved_bytes - layer.result_bytes
    assert checkpointed.workspace_bytes == layer.workspace_bytes + inputs
    assert checkpointed.layers[0].total_ms == layer.total_ms
    assert checkpointed.memory.peak_bytes < 0.75 * whole.memory.peak_bytes
    assert "checkpointed: its inputs are recomputed" in str(checkpointed)


def test_a_budget_counts_a_checkpointed_region_once() -> None:
    needed = _plan(checkpoint=True).memory.peak_bytes
    assert _plan(checkpoint=True, gpu_memory=round(1.05 * needed)).layers
    with pytest.raises(OutOfMemory):
        _plan(gpu_memory=round(1.05 * needed), recompute="none")


@pytest.mark.parametrize(("optimizer", "tensors"), [("adamw", 2), ("momentum", 1), ("sgd", 0)])
def test_the_optimizers_state_counts_like_parameters(optimizer: str, tensors: int) -> None:
    plan, bare = _plan(optimizer=optimizer), _plan()
    assert _part(plan.memory, "optimizer state") == tensors * _part(bare.memory, "parameters")
    assert plan.memory.unknown == ()
    assert bare.memory.unknown == ("optimizer state",)


def test_bytes_of_state_for_each_parameter_may_be_given() -> None:
    parameters = _part(_plan().memory, "parameters") // 4
    assert _part(_plan(optimizer=12).memory, "optimizer state") == 12 * parameters


@pytest.mark.parametrize("optimizer", ["adan", -1, True])
def test_an_unknown_optimizer_lists_the_choices(optimizer: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"Do: use one of adam, adamw, .*bytes of state"):
        _plan(optimizer=optimizer)


def test_the_peak_is_told_by_block_of_the_model() -> None:
    memory = _plan().memory
    blocks = dict(memory.by_block)
    activations = sum(part.bytes for part in memory.parts if part.kind != "whole")
    reuse = _part(memory, "held by Inductor for reuse")
    assert sum(blocks.values()) == activations - reuse
    assert {"qkv.0", "down.1", "embed"} <= set(blocks)


def test_a_value_cut_into_parts_counts_once_and_passes_its_gradient_on() -> None:
    def cut(x: Tensor, w: Tensor) -> Tensor:
        a, b = F.linear(x, w).chunk(2, -1)
        return (a * b).sum()

    inputs = [torch.randn(512, 64), torch.randn(128, 64, requires_grad=True)]
    captured = _captured(cut, *inputs)
    graph = captured.graph_module.graph
    places = graph.find_nodes(op="placeholder")
    has_grad = dict(zip(places, captured.needs_grad, strict=True))
    values = values_of(graph, lambda node: 4096, has_grad)
    assert {node.name for node in kept_values(values)} == {"linear"}
    assert graph.find_nodes(op="output")[0].args[0] in values.has_grad
