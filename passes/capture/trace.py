"""From Dynamo's graph to a flat pre-dispatch ATen graph."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from ringfx.errors import CaptureRefused
from ringfx.ir.values import Captured
from ringfx.passes.capture import constructs
from ringfx.passes.capture.breaks import graph_break, uncompiled_caller
from ringfx.passes.capture.definitions import DEFINITIONS
from ringfx.passes.capture.flex import drop_block_masks
from ringfx.passes.capture.functional import functionalize, mutates
from ringfx.passes.capture.gradient_hooks import move_hooks
from ringfx.passes.capture.gradients import stamp_gradients
from ringfx.passes.capture.losses import LOSS_DECOMPOSITIONS
from ringfx.passes.capture.numbers import specialize_floats
from ringfx.passes.capture.origin import input_names, stamp_origins
from ringfx.passes.capture.placed import PlacedCalls, holds_dtensors, plain_results
from ringfx.passes.capture.precision import (
    Autocast,
    autocast_off,
    decompositions_with_casts,
    enters_autocast,
)
from ringfx.passes.capture.regions import fold_regions
from ringfx.passes.capture.simplify import simplify
from ringfx.passes.capture.unknown import decompose_unknown
from ringfx.torch_compat.fake_tensors import (
    FakeTensor,
    FakeTensorMode,
    TracingContext,
    as_fake,
    forget_dynamic_marks,
)

__all__ = ["capture", "keep_value", "name_arguments", "named_inputs"]


def capture(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    known: Callable[[object], object | None],
    on_placed: PlacedCalls | None = None,
) -> Captured:
    """Trace Dynamo's graph into ATen operators on global shapes.

    Parameters
    ----------
    gm
        Dynamo's graph, parameters lifted to placeholders.
    example_inputs
        One value for each placeholder, real or fake.
    known
        Whether later passes have a rule for an operator; others are decomposed where torch can.
    on_placed
        What calls on DTensors are on this rank's parts, which ``example_inputs`` hold; without it
        they are refused.

    Raises
    ------
    CaptureRefused
        For a construct that cannot be carried with its meaning and gradient kept.
    """
    if not holds_dtensors(gm):
        on_placed = None
    elif on_placed is None:
        raise CaptureRefused(
            "the program holds DTensors, which are not looked at here. Do: leave "
            "parallelize_module (or tp_plan) out."
        )
    autocast, autocasts = Autocast.now(), enters_autocast(gm)
    with autocast_off():
        return _capture(gm, example_inputs, known, autocast if autocasts else None, on_placed)


def _capture(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    known: Callable[[object], object | None],
    autocast: Autocast | None,
    on_placed: PlacedCalls | None,
) -> Captured:
    specialize_floats(gm)
    constructs.refuse_unsupported(gm)
    fold_regions(gm)
    drop_block_masks(gm)
    move_hooks(gm)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    mode = _fake_mode(example_inputs)
    forget_dynamic_marks(mode)
    fakes = [_fake(mode, v) for v in example_inputs]
    table = LOSS_DECOMPOSITIONS | DEFINITIONS
    with mode, fx_traceback.preserve_node_meta(), (autocast or Autocast.now()).active():
        traced = make_fx(
            lambda *args: plain_results(constructs.Inliner(gm, on_placed=on_placed).run(*args)),
            pre_dispatch=True,
            decomposition_table=table if autocast is None else decompositions_with_casts(table),
        )(*fakes)
    names = named_inputs(gm)
    needs_grad = tuple(_requires_grad(v) for v in example_inputs)
    written = functionalize(traced, mode, needs_grad)
    traced = decompose_unknown(written.graph_module, mode, fakes, known)
    if any(map(mutates, traced.graph.nodes)):  # in what was taken apart
        traced = functionalize(traced, mode, needs_grad).graph_module
    for node, value in zip(traced.graph.find_nodes(op="placeholder"), fakes, strict=True):
        node.meta.setdefault("val", value)  # numbers: sizes that Dynamo passes along
    stamp_origins(traced.graph)
    stamp_gradients(traced.graph, needs_grad)
    simplify(traced)
    traced.recompile()
    return Captured(
        graph_module=traced,
        input_names=names,
        is_parameter=tuple(isinstance(v, torch.nn.Parameter) for v in example_inputs),
        needs_grad=needs_grad,
        writes=written.writes,
        returned=written.returned,
        buffers={
            i: value
            for i, (node, given) in enumerate(zip(placeholders, example_inputs, strict=True))
            if i not in written.writes and _is_buffer(node, value := _with_values(given))
        },
        unvalued=frozenset(
            i
            for i, (node, given) in enumerate(zip(placeholders, example_inputs, strict=True))
            if _is_held(node)
            and not isinstance(given, torch.nn.Parameter)
            and isinstance(_with_values(given), FakeTensor)
        ),
        held=frozenset(
            i
            for i, (node, given) in enumerate(zip(placeholders, example_inputs, strict=True))
            if isinstance(given, torch.nn.Parameter) or _is_held(node)
        ),
        graph_break=graph_break(gm),
        uncompiled_caller=uncompiled_caller(),
    )


def _fake_mode(values: Sequence[Any]) -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        mode: FakeTensorMode = context.fake_mode
        return mode
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode()


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    """The value as a fake of static shape: one program is compiled for each sequence length.

    Reading a symbolic size as a number makes Dynamo guard on it, so other lengths compile anew.
    """
    if isinstance(value, torch.SymInt):
        return int(value)
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, FakeTensor) and value.fake_mode is mode:
        if not any(isinstance(s, torch.SymInt) for s in (*value.shape, *value.stride())):
            return value
        sizes, strides = [int(s) for s in value.shape], [int(s) for s in value.stride()]
        with mode:
            made = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        return made.requires_grad_(value.requires_grad)
    return as_fake(mode, value)


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def keep_value(fake: torch.Tensor, value: torch.Tensor) -> None:
    """A fake tensor that stands for a module's tensor, with readable values."""
    fake.ringfx_value = value  # type: ignore[attr-defined]


def _with_values(given: Any) -> Any:
    return getattr(given, "ringfx_value", given)


def _is_buffer(node: torch.fx.Node, value: Any) -> bool:
    """A module's tensor, no parameter, whose values can be read."""
    plain = type(value) is torch.Tensor and value.device.type != "meta" and not value.requires_grad
    return plain and _is_held(node)


def _is_held(node: torch.fx.Node) -> bool:
    source = getattr(node.meta.get("grapharg"), "source", None)
    return source is not None and bool(source.guard_source.is_unspecialized_nn_module())


def name_arguments(gm: torch.fx.GraphModule, forward: Callable[..., Any]) -> None:
    """What forward is given by position has the names of its parameters in messages."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    with contextlib.suppress(TypeError, ValueError):  # a callable that does not say
        parameters = inspect.signature(forward).parameters.values()
        gm.meta["ringfx_arguments"] = [p.name for p in parameters if p.kind in by_position]


def named_inputs(gm: torch.fx.GraphModule) -> tuple[str, ...]:
    """A name for each placeholder that a user would recognise."""
    sources = [_source_text(n) for n in gm.graph.find_nodes(op="placeholder")]
    return input_names(sources, gm.meta.get("ringfx_arguments", ()))


def _source_text(node: torch.fx.Node) -> str:
    grapharg = node.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    if source is None:
        return str(node.name)
    name = source.name
    return str(name() if callable(name) else name)
