"""What each strategy costs at each attention, and which to take: see docs/cost-model.md.

profile (constants with their origins) -> predict (time and memory of one layer) -> candidates
-> overrides (the user's word) -> budget (the exact choice) -> choose (one LayerPlan a layer)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringfx.cost_model.choice.choose import choose
    from ringfx.cost_model.choice.overrides import StrategyChoice
    from ringfx.cost_model.peak_memory.peak import predict_memory
    from ringfx.cost_model.prediction.kernel_choice import unmeasured, unpriced
    from ringfx.cost_model.prediction.outside_attention import hidden_ms, outside_ms
    from ringfx.cost_model.prediction.predict import Prediction, predict
    from ringfx.cost_model.prediction.profile import Profile, available_profiles, load_profile
    from ringfx.units.parse import parse_bytes, parse_tokens

__all__ = [
    "Prediction",
    "Profile",
    "StrategyChoice",
    "available_profiles",
    "choose",
    "hidden_ms",
    "load_profile",
    "outside_ms",
    "parse_bytes",
    "parse_tokens",
    "predict",
    "predict_memory",
    "unmeasured",
    "unpriced",
]

_HOME = {
    "Prediction": "ringfx.cost_model.prediction.predict",
    "Profile": "ringfx.cost_model.prediction.profile",
    "StrategyChoice": "ringfx.cost_model.choice.overrides",
    "available_profiles": "ringfx.cost_model.prediction.profile",
    "choose": "ringfx.cost_model.choice.choose",
    "hidden_ms": "ringfx.cost_model.prediction.outside_attention",
    "load_profile": "ringfx.cost_model.prediction.profile",
    "outside_ms": "ringfx.cost_model.prediction.outside_attention",
    "parse_bytes": "ringfx.units.parse",
    "parse_tokens": "ringfx.units.parse",
    "predict": "ringfx.cost_model.prediction.predict",
    "predict_memory": "ringfx.cost_model.peak_memory.peak",
    "unmeasured": "ringfx.cost_model.prediction.kernel_choice",
    "unpriced": "ringfx.cost_model.prediction.kernel_choice",
}
"""Loaded when first asked for: predictions are below strategies and operators, choices above."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ringfx.cost_model' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value
