"""What happens to one variant: its sites, and how far split results are from unsplit ones.

The oracle is the stock model in eager mode on the same rank; ``ringfx/comparison/agreement.py``
says when results count as equal.
"""

from __future__ import annotations

import copy
import re
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging as transformers_logging

import ringfx
from ringfx.comparison.agreement import (
    TOLERANCE,
    Exact,
    Results,
    disagreements,
    excesses,
    excused,
    none_for_zeros,
)
from ringfx.comparison.results import tensors
from ringfx.errors import VerificationError
from ringfx.ir.note import NoteKind, texts_of
from ringfx.ir.plan import Plan
from tests.corpus.build import build, has_experts, hidden_size, total
from tests.corpus.row import Variant
from tests.corpus.table import VARIANTS

__all__ = ["ONE_STEP", "Outcome", "Setup", "compiled_whole", "has_numbers", "measure"]

GRADIENT_OF = "gradient of "
STEP_LENGTH = 0.05
"""Of each step of the optimizer, after its gradients were scaled to the length 1 in all."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a variant is run."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of ``ringfx.optimize``."""
    compiler: str = "eager"
    steps: int = 1
    """Results compared are those of the last one, and every step's loss."""
    dtype: str | None = None
    """In place of the row's: in float64 no activation changes side by rounding."""

    def variant(self, name: str) -> Variant:
        (found,) = [v for v in VARIANTS if v.name == name]
        return replace(found, row=replace(found.row, dtype=self.dtype or found.row.dtype))


ONE_STEP = Setup()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One rank's run of a variant."""

    seconds: float
    error: str = ""
    """``Type: text`` of what it raised."""
    refused: bool = False
    """The error is one that ringfx raises on purpose."""
    trace: str = ""
    """Where the error came from."""
    loss: float = 0.0
    output: float = 0.0
    worst_output: str = ""
    gradient: float = 0.0
    worst_gradient: str = ""
    rounding: tuple[str, ...] = ()
    """Tensors that agree only up to the unsplit model's own rounding."""
    found_by: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    declined: tuple[str, ...] = ()
    gathers: tuple[str, ...] = ()
    """Whole-sequence gathers of a hidden state: where, how many numbers a token."""
    narrow_gathers: int = 0
    breaks: tuple[str, ...] = ()
    whole_bytes: int = 0
    split_bytes: int = 0

    def wrong(self, variant: Variant) -> bool:
        """Whether loss, outputs or a gradient differ by more than rounding (NaN included)."""
        bound = TOLERANCE[variant.precision]
        return not all(x <= bound for x in (self.loss, self.output, self.gradient))


def measure(name: str, compare: bool = True, setup: Setup = ONE_STEP) -> Outcome:
    """Runs the variant on this rank; only what it raises itself ends in the outcome."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    variant = setup.variant(name)
    started = time.monotonic()
    try:
        fields = _run(variant, compare, setup)
    except ringfx.RingfxError as error:
        # A defect that names itself is no refusal with a reason.
        refused = not isinstance(error, VerificationError)
        fields = {"error": _portable(f"{type(error).__name__}: {error}"), "refused": refused}
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        said = _portable(f"{type(error).__name__}: {error}")
        fields = {"error": said, "trace": _portable(text[-6000:])}
    return Outcome(seconds=round(time.monotonic() - started, 1), **fields)


def compiled_whole(name: str, setup: Setup) -> str:
    """What the unsplit model raises under ``torch.compile`` itself; nothing where it runs."""
    variant = setup.variant(name)
    model = build(variant)
    compiled = torch.compile(model.forward, backend=setup.compiler, dynamic=False)
    try:
        _step(variant, model, getattr(torch, variant.dtype), compiled, None)
    except Exception as error:
        return _portable(f"{type(error).__name__}: {error}")
    return ""


def has_numbers(name: str, setup: Setup) -> bool:
    """Whether the unsplit model's loss stays finite in the setup's type: masks of a type's own
    smallest number overflow in another."""
    variant = setup.variant(name)
    found = _trained(setup.steps, variant, build(variant), getattr(torch, variant.dtype))
    losses = (x for key, x in found.tensors.items() if key.startswith("loss"))
    return all(x is not None and bool(torch.isfinite(x).all()) for x in losses)


def _run(variant: Variant, compare: bool, setup: Setup) -> dict[str, Any]:
    stock = build(variant)
    model = copy.deepcopy(stock)
    options = {"compiler": setup.compiler, "on_unsupported": "gather", **setup.options}
    optimized = ringfx.optimize(model, **options)
    ours = _trained(setup.steps, variant, model, getattr(torch, variant.dtype), optimized)
    plan: Plan = getattr(optimized, "plan")  # noqa: B009
    found = _described(variant, plan)
    return found | (_differences(ours, stock, variant, setup) if compare else {})


def _trained(
    steps: int,
    variant: Variant,
    owner: nn.Module,
    dtype: torch.dtype,
    call: Callable[..., Any] | None = None,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> Results:
    """The last step's results, and the losses of those before it."""
    optimizer = torch.optim.SGD(owner.parameters(), lr=STEP_LENGTH)
    losses: dict[str, torch.Tensor | None] = {}
    for number in range(1, steps):
        found = _step(variant, owner, dtype, call, inputs)
        losses[f"loss of step {number}"] = found.tensors["loss"]
        torch.nn.utils.clip_grad_norm_(owner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    last = _step(variant, owner, dtype, call, inputs)
    units = {**last.units, **dict.fromkeys(losses, last.units["loss"])}
    return replace(last, tensors={**losses, **last.tensors}, units=units)


def _step(
    variant: Variant,
    owner: nn.Module,
    dtype: torch.dtype,
    call: Callable[..., Any] | None,
    inputs: Mapping[str, torch.Tensor] | None,
) -> Results:
    """Forward and backward; outputs are touched after the backward, as most training code does."""
    given = inputs or variant.row.inputs()
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in given.items()}
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=variant.autocast):
        output = (call or owner)(**given, **variant.row.calls)
        loss = total(output)
    loss.backward()  # type: ignore[no-untyped-call]
    results = {"loss": loss} | tensors(output)
    found = {name: _plain(x) for name, x in results.items()}
    gradients = {
        f"{GRADIENT_OF}{name}": None if p.grad is None else _plain(p.grad)
        for name, p in owner.named_parameters()
    }
    units = {k: torch.finfo(x.dtype).eps for k, x in results.items() if x.is_floating_point()}
    return Results(tensors={**found, **gradients}, units=units)


def _plain(value: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        copied = value.detach().clone()
        return copied.to(torch.complex128 if copied.is_complex() else torch.float64)


def _differences(ours: Results, model: nn.Module, variant: Variant, setup: Setup) -> dict[str, Any]:
    dtype, steps = variant.dtype, setup.steps
    stock = _trained(steps, variant, copy.deepcopy(model), getattr(torch, dtype))
    if setup.compiler != "eager":
        ours = none_for_zeros(ours, stock)
    if variant.autocast:
        exact = _exact(variant, model, steps)
        return _worst_of_each(ours, stock, excesses(ours, stock, exact), set())
    found = disagreements(ours, stock)
    far = {name for name, value in found.items() if not value <= TOLERANCE[dtype]}
    rounded: set[str] = set()
    if far:
        rounded = excused(far, ours, stock, _exact(variant, model, steps), dtype)
    return _worst_of_each(ours, stock, found, rounded)


def _worst_of_each(
    ours: Results, stock: Results, found: Mapping[str, float], rounded: set[str]
) -> dict[str, Any]:
    kept = {name: value for name, value in found.items() if name not in rounded}
    gradients = {name: value for name, value in kept.items() if name.startswith(GRADIENT_OF)}
    outputs = {n: v for n, v in kept.items() if n not in gradients and n != "loss"}
    worst_output, output = _worst(outputs)
    worst_gradient, gradient = _worst(gradients)
    return {
        "loss": kept.get("loss", 0.0),
        "output": output,
        "worst_output": worst_output,
        "gradient": gradient,
        "worst_gradient": worst_gradient + _presence(ours, stock, worst_gradient),
        "rounding": tuple(sorted(rounded)),
    }


def _exact(variant: Variant, model: nn.Module, steps: int) -> Results:
    """The stock model without any rounding to float32; grouped products know no float64."""
    model = copy.deepcopy(model).double()
    if has_experts(model):
        model.set_experts_implementation("eager")
    inputs = variant.row.inputs()  # drawn as numbers of the default type
    torch.set_default_dtype(torch.float64)
    try:
        with Exact():
            return _trained(steps, variant, model, torch.float64, inputs=inputs)
    finally:
        torch.set_default_dtype(torch.float32)


def _worst(differences: Mapping[str, float]) -> tuple[str, float]:
    return max(differences.items(), key=lambda item: item[1], default=("none", 0.0))


def _presence(ours: Results, stock: Results, name: str) -> str:
    """In words, where one side has no such tensor or one that is not a number."""
    here, there = ours.tensors.get(name), stock.tensors.get(name)
    if here is None or there is None:
        return "" if here is there else f", None {'here' if here is None else 'unsplit'}"
    return ", NaN here" if here.isnan().any() else ""


def _described(variant: Variant, plan: Plan) -> dict[str, Any]:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    wide, narrow = [], 0
    for move in plan.collectives:
        if move.kind != "all_gather":
            continue
        width = _numbers_a_token(move.bytes_moved, plan, variant, ranks)
        if width >= hidden_size(variant.row) / 2:
            wide.append(_portable(f"{move.name or move.node}: {move.reason}"))
        else:
            narrow += 1
    return {
        "found_by": tuple(layer.found_by for layer in plan.layers),
        "masks": tuple(layer.mask for layer in plan.layers),
        "strategies": tuple(layer.strategy for layer in plan.layers),
        "declined": tuple(_portable(f"{d.name}: {d.reason}") for d in plan.declined),
        "gathers": tuple(wide),
        "narrow_gathers": narrow,
        "breaks": tuple(map(_portable, texts_of(plan.notes, NoteKind.GRAPH_BREAK))),
        "whole_bytes": plan.memory.whole_bytes,
        "split_bytes": plan.memory.split_bytes,
    }


def _numbers_a_token(moved: int, plan: Plan, variant: Variant, ranks: int) -> float:
    """How wide a gathered value is: a hidden state, or a few numbers that routing needs."""
    batch: int = next(iter(variant.row.inputs().values())).shape[0]
    length = max((axis.length for axis in plan.axes), default=1)
    size = 8 if variant.dtype == "float64" else 4
    return moved * ranks / max(ranks - 1, 1) / (batch * length * size)


def _portable(text: str) -> str:
    """Without the folder of this machine that packages are installed in."""
    return re.sub(r"\S*/site-packages/", "", text)
