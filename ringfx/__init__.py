"""ringfx: split the sequence of any PyTorch model over many devices, without changing the model."""

from ringfx.api import optimize, plan, stats
from ringfx.errors import RingfxError
from ringfx.failures.process_exit import tell_when_leaving
from ringfx.ir.plan import LayerPlan, Plan

__version__ = "0.1.0"
__all__ = ["LayerPlan", "Plan", "RingfxError", "__version__", "ops", "optimize", "plan", "stats"]

tell_when_leaving()  # also of what ends this process before it has optimized a model
