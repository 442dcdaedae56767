"""``strategy="auto"`` of a call by hand: the strategy with the least predicted time.

Inside a model the plan chooses, with memory in view. Here only the call is known.
"""

from __future__ import annotations

from ringfx.comm.process_group import Ranks
from ringfx.comm.rendezvous import meet
from ringfx.cost_model.prediction.predict import predict
from ringfx.cost_model.prediction.profile import load_profile
from ringfx.errors import ProfileError
from ringfx.ir.values import AttentionSite
from ringfx.strategies import DEFAULT, STRATEGIES

__all__ = ["AUTO", "fastest"]

AUTO = "auto"


def fastest(site: AttentionSite, group: str, size: int) -> str:
    """The strategy that rank 0 predicts to be the fastest; ranks may hold different profiles.

    All ranks of the group ask together, at their first call of this kind.
    """
    if size == 1 or site.heads % site.kv_heads:  # which the operator refuses
        return DEFAULT
    ranks, names = Ranks.named(group, site.name), list(STRATEGIES)
    agreed = ranks.channel.agreed
    if site not in agreed:
        mine = names.index(_predicted_fastest(site, size))
        agreed[site] = names[meet(ranks, f"{site.name}: choice of a strategy", [mine])[0][0]]
    chosen: str = agreed[site]
    return chosen


def _predicted_fastest(site: AttentionSite, size: int) -> str:
    try:
        profile = load_profile(device=site.device)
    except ProfileError:  # nothing is known of this type of device
        return DEFAULT
    able = [s for s in STRATEGIES.values() if s.admits(site, size) is None]
    return min(able, key=lambda strategy: predict(site, strategy, size, profile).total_ms).name
