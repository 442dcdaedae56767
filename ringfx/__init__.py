"""ringfx: split the sequence of any PyTorch model over many devices, without changing the model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ringfx.errors import RingfxError
from ringfx.failures.process_exit import register_exit_report

if TYPE_CHECKING:
    from ringfx import data, integrations, nn, ops
    from ringfx.api import optimize, plan, stats
    from ringfx.comparison.run import verify
    from ringfx.ir import tiles
    from ringfx.ir.plan import LayerPlan, Plan
    from ringfx.passes.axes.rules import RULES
    from ringfx.strategies import STRATEGIES, Strategy
    from ringfx.watch.verbosity import set_verbosity

__version__ = "0.1.0"
__all__ = [
    "RULES", "STRATEGIES", "LayerPlan", "Plan", "RingfxError", "Strategy", "__version__", "data",
    "integrations", "nn", "ops", "optimize", "plan", "set_verbosity", "stats", "tiles",
    "verify",
]  # fmt: skip

_HOME = {
    "optimize": "ringfx.api", "plan": "ringfx.api", "stats": "ringfx.api",
    "verify": "ringfx.comparison.run", "set_verbosity": "ringfx.watch.verbosity",
    "LayerPlan": "ringfx.ir.plan", "Plan": "ringfx.ir.plan",
    "STRATEGIES": "ringfx.strategies", "Strategy": "ringfx.strategies",
    "RULES": "ringfx.passes.axes.rules",
}  # fmt: skip
_ROOMS = {
    "data": "ringfx.data", "integrations": "ringfx.integrations", "nn": "ringfx.nn",
    "ops": "ringfx.ops", "tiles": "ringfx.ir.tiles",
}  # fmt: skip
"""Loaded when first asked for: whoever calls ``ringfx.ops`` alone needs no compiler."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(_ROOMS[name])
    if name not in _HOME:
        raise AttributeError(f"module 'ringfx' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_exit_report()  # also of what ends this process before it has optimized a model
