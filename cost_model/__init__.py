"""What each strategy costs at each attention, and which to take: see docs/cost-model.md.

profile (constants with their origins) -> formulas (time and memory of one layer) -> candidates
-> overrides (the user's word) -> budget (the exact choice) -> choose (one LayerPlan a layer)
"""

from ringfx.cost_model.choice.choose import choose
from ringfx.cost_model.choice.overrides import StrategyChoice
from ringfx.cost_model.peak_memory.peak import alive_in, predict_memory
from ringfx.cost_model.prediction.formulas import Prediction, predict
from ringfx.cost_model.prediction.kernel_choice import unpriced
from ringfx.cost_model.prediction.outside_attention import outside_ms
from ringfx.cost_model.prediction.profile import Profile, available_profiles, load_profile
from ringfx.units.parse import parse_bytes, parse_tokens

__all__ = [
    "Prediction",
    "Profile",
    "StrategyChoice",
    "alive_in",
    "available_profiles",
    "choose",
    "load_profile",
    "outside_ms",
    "parse_bytes",
    "parse_tokens",
    "predict",
    "predict_memory",
    "unpriced",
]
