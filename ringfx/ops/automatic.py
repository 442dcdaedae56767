"""``strategy="auto"`` of a call by hand: the strategy with the least predicted time.

Inside a model the plan chooses, with memory in view. Here only the call is known.
"""

from __future__ import annotations

from functools import lru_cache

from ringfx.comm.process_group import Ranks
from ringfx.comm.rendezvous import meet
from ringfx.cost_model.prediction.predict import predict
from ringfx.cost_model.prediction.profile import load_profile
from ringfx.errors import ProfileError
from ringfx.ir.values import AttentionSite
from ringfx.strategies import DEFAULT, STRATEGIES

__all__ = ["AUTO", "fastest"]

AUTO = "auto"


@lru_cache(maxsize=1024)
def fastest(site: AttentionSite, group: str, size: int) -> str:
    """The strategy that rank 0 predicts to be the fastest; ranks may hold different profiles.

    All ranks of the group ask together, at their first call of this size.
    """
    if size == 1 or site.heads % site.kv_heads:  # which the operator refuses
        return DEFAULT
    names = list(STRATEGIES)
    ranks = Ranks.named(group, site.name)
    mine = names.index(_predicted_fastest(site, size))
    return names[meet(ranks, f"{site.name}: choice of a strategy", [mine])[0][0]]


def _predicted_fastest(site: AttentionSite, size: int) -> str:
    try:
        profile = load_profile(device=site.device)
    except ProfileError:  # nothing is known of this type of device
        return DEFAULT
    able = [s for s in STRATEGIES.values() if s.admits(site, size) is None]
    return min(able, key=lambda strategy: predict(site, strategy, size, profile).total_ms).name
