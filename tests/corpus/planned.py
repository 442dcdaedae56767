"""What ``ringfx.plan`` says of a variant beside what ran on two ranks."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

import ringfx
from ringfx.ir.plan import Plan
from tests.corpus.build import build
from tests.corpus.row import Variant
from tests.corpus.table import VARIANTS

__all__ = ["difference", "planned", "ran"]

BY_NAME = {v.name: v for v in VARIANTS}


def planned(name: str) -> Plan | str:
    """Offline, for two ranks; an error as text."""
    _quiet()
    variant = BY_NAME[name]
    try:
        return ringfx.plan(
            build(variant), (), _given(variant), world_size=2, on_unsupported="gather"
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def ran(names: list[str]) -> dict[str, Plan | str]:
    """On this rank, after a forward."""
    _quiet()
    found: dict[str, Plan | str] = {}
    for name in names:
        variant = BY_NAME[name]
        model: Any = ringfx.optimize(build(variant), compiler="eager", on_unsupported="gather")
        torch.manual_seed(1)
        try:
            model(**_given(variant))
            found[name] = model.plan
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        torch._dynamo.reset()
    return found


def difference(plan: Plan | str, run: Plan | str) -> str:
    """In words; empty where they agree."""
    if isinstance(plan, str) or isinstance(run, str):
        same = isinstance(plan, str) and isinstance(run, str) and plan[:60] == run[:60]
        return "" if same else f"planned: {_brief(plan)}; ran: {_brief(run)}"
    for what, mine, its in zip(
        ("layers", "axes", "messages"), _told(plan), _told(run), strict=True
    ):
        if mine != its:
            return f"{what}: planned {mine}, ran {its}"
    return ""


def _brief(plan: Plan | str) -> str:
    return plan[:300] if isinstance(plan, str) else f"{len(plan.layers)} layers"


def _told(plan: Plan) -> tuple[object, ...]:
    """Messages that the model's own Python asks for between programs are left out."""
    moves = Counter((m.kind, m.in_backward) for m in plan.collectives if m.node != "python")
    layers = [(x.name, x.strategy, x.axis) for x in plan.layers]
    return layers, [(a.axis, a.length, a.layout) for a in plan.axes], dict(moves)


def _given(variant: Variant) -> dict[str, Any]:
    dtype = getattr(torch, variant.row.dtype)
    inputs = variant.row.inputs()
    tensors = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    return {**tensors, **variant.row.calls}


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
