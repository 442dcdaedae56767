"""What happens to one variant: its sites, and how far split results are from unsplit ones.

The oracle is the stock model in eager mode on the same rank. Outputs and gradients agree within
1e-4 of the largest element in float32 (1e-9 in float64). A gradient that is zero in theory, such as
a key's bias, is noise in floating point: the unsplit model's own float32 gradients of key biases
lie up to 3e-8 of the largest gradient G from float64's. So a gradient below G/1000 is compared
with that, an absolute difference of 1e-7 G: one rounding of the largest gradient.
"""

from __future__ import annotations

import copy
import re
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging as transformers_logging

import ringfx
from ringfx.plan import Plan
from tests.corpus.build import build, hidden_size, tensors, total
from tests.corpus.row import Variant
from tests.corpus.table import VARIANTS
from tests.harness import gradient_differences

__all__ = ["Outcome", "measure"]

TOLERANCE: Mapping[str, float] = {"float32": 1e-4, "float64": 1e-9, "float64/eager": 1e-6}
"""Spelled-out attention takes its softmax in float32 even of a float64 model, ringfx in float64."""
OPTIONS: Mapping[str, Any] = {"compiler": "eager", "on_unsupported": "gather"}
GRADIENT_FLOOR = 1e-3
FLOAT_FLOOR: Mapping[str, float] = {"float32": 1e-5, "float64": 1e-12}


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
    num_gradients: int = 0
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
        dtype = variant.row.dtype
        bound = TOLERANCE.get(f"{dtype}/{variant.attention}", TOLERANCE[dtype])
        return not all(x <= bound for x in (self.loss, self.output, self.gradient))


def measure(name: str, compare: bool = True) -> Outcome:
    """Runs the variant on this rank; only what it raises itself ends in the outcome."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    (variant,) = [v for v in VARIANTS if v.name == name]
    started = time.monotonic()
    try:
        fields = _run(variant, compare)
    except ringfx.RingfxError as error:
        fields = {"error": f"{type(error).__name__}: {error}", "refused": True}
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        fields = {"error": f"{type(error).__name__}: {error}", "trace": text[-6000:]}
    return Outcome(seconds=round(time.monotonic() - started, 1), **fields)


def _run(variant: Variant, compare: bool) -> dict[str, Any]:
    stock = build(variant)
    model = copy.deepcopy(stock)
    optimized = ringfx.optimize(model, **OPTIONS)
    ours = _step(variant, optimized, model)
    plan: Plan = getattr(optimized, "plan")  # noqa: B009
    found = _described(variant, plan)
    return found | (_differences(ours, _step(variant, stock, stock), variant) if compare else {})


@dataclass(frozen=True, eq=False)
class _Step:
    loss: torch.Tensor
    outputs: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor | None]


def _step(variant: Variant, call: nn.Module, owner: nn.Module) -> _Step:
    """Forward and backward; outputs are touched after the backward, as most training code does."""
    row = variant.row
    dtype = getattr(torch, row.dtype)
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in row.inputs().items()}
    torch.manual_seed(1)
    output = call(**given, **row.calls)
    loss = total(output)
    loss.backward()  # type: ignore[no-untyped-call]
    return _Step(
        loss=_plain(loss),
        outputs={path: _plain(x) for path, x in tensors(output).items()},
        gradients={
            n: None if p.grad is None else _plain(p.grad) for n, p in owner.named_parameters()
        },
    )


def _plain(value: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return value.detach().clone().to(torch.float64)


def _differences(ours: _Step, oracle: _Step, variant: Variant) -> dict[str, Any]:
    floor = FLOAT_FLOOR[variant.row.dtype]
    outputs = {
        path: _difference(ours.outputs.get(path), whole, floor)
        for path, whole in oracle.outputs.items()
    } | {path: float("inf") for path in ours.outputs.keys() - oracle.outputs.keys()}
    gradients = gradient_differences(_reached(ours, oracle), oracle.gradients, GRADIENT_FLOOR)
    worst_output = max(outputs, key=lambda path: outputs[path])
    worst_gradient = max(gradients, key=lambda path: gradients[path])
    return {
        "loss": _difference(ours.loss, oracle.loss, floor),
        "output": outputs[worst_output],
        "worst_output": worst_output,
        "gradient": gradients[worst_gradient],
        "worst_gradient": worst_gradient + _presence(ours, oracle, worst_gradient),
        "num_gradients": sum(g is not None for g in oracle.gradients.values()),
    }


def _reached(ours: _Step, oracle: _Step) -> dict[str, torch.Tensor | None]:
    """Zero stands for none where no loss reaches a parameter, as torch.compile itself has it."""
    return {
        name: None if oracle.gradients[name] is None and g is not None and not g.any() else g
        for name, g in ours.gradients.items()
    }


def _presence(ours: _Step, oracle: _Step, name: str) -> str:
    """In words, where one side has no gradient at all or one that is not a number."""
    here, there = ours.gradients[name], oracle.gradients[name]
    if here is None or there is None:
        return "" if here is there else f", None {'here' if here is None else 'unsplit'}"
    return ", NaN here" if here.isnan().any() else ""


def _difference(ours: torch.Tensor | None, oracle: torch.Tensor, floor: float) -> float:
    """max|ours - oracle| / max|oracle|; infinite where they cannot be compared."""
    if ours is None or ours.shape != oracle.shape:
        return float("inf")
    if not oracle.numel():
        return 0.0
    finite = oracle[oracle.isfinite()]
    scale = max(float(finite.abs().max()) if finite.numel() else 0.0, floor)
    distance = float(torch.where(ours == oracle, 0.0, ours - oracle).abs().max())
    return float("inf") if distance != distance else distance / scale


def _described(variant: Variant, plan: Plan) -> dict[str, Any]:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    wide, narrow = [], 0
    for move in plan.reshardings:
        if move.kind != "gather":
            continue
        width = _numbers_a_token(move.bytes_moved, plan, variant, ranks)
        if width >= hidden_size(variant.row) / 2:
            wide.append(f"{move.name or move.node}: {move.reason}")
        else:
            narrow += 1
    return {
        "found_by": tuple(layer.found_by for layer in plan.layers),
        "masks": tuple(layer.mask for layer in plan.layers),
        "strategies": tuple(layer.strategy for layer in plan.layers),
        "declined": tuple(f"{d.name}: {d.reason}" for d in plan.declined),
        "gathers": tuple(wide),
        "narrow_gathers": narrow,
        "breaks": tuple(_portable(n) for n in plan.notes if n.startswith("graph break")),
        "whole_bytes": plan.memory.whole_bytes,
        "split_bytes": plan.memory.split_bytes,
    }


def _numbers_a_token(moved: int, plan: Plan, variant: Variant, ranks: int) -> float:
    """How wide a gathered value is: a hidden state, or a few numbers that routing needs."""
    batch: int = next(iter(variant.row.inputs().values())).shape[0]
    length = max((axis.length for axis in plan.axes), default=1)
    size = 8 if variant.row.dtype == "float64" else 4
    return moved * ranks / max(ranks - 1, 1) / (batch * length * size)


def _portable(text: str) -> str:
    """Without the folder of this machine that packages are installed in."""
    return re.sub(r"\S*/site-packages/", "", text)
