"""Choose a strategy for every layer at once: the fastest assignment whose memory fits.

With t(l, s) the time of layer l under strategy s, and the peak over the moments of the program
(``timeline.py``) of all that is alive, saved tensors and workspaces of the layers among it:

    minimise    sum over l of t(l, s_l)
    subject to  peak(s) <= budget

With a budget a layer has more options than strategies: more groups of heads, and to be computed
again in backward, without attention or with it, at the time that this takes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import TypeAlias

from ringfx.cost_model.choice.budget import Menu
from ringfx.cost_model.choice.candidates import Candidates, all_candidates
from ringfx.cost_model.choice.fits import Fitting, Picked
from ringfx.cost_model.choice.infeasible import infeasible, refuse_hopeless
from ringfx.cost_model.choice.layers_again import Host, Offload, Recompute, with_recompute
from ringfx.cost_model.choice.overrides import AUTO, Override, StrategyChoice, resolve_overrides
from ringfx.cost_model.choice.problem import Asked, Problem, longest_that_fits
from ringfx.cost_model.prediction.predict import Prediction
from ringfx.cost_model.prediction.profile import Profile
from ringfx.errors import StrategyRefused
from ringfx.ir.memory_plan import MARGIN, MemoryTimeline
from ringfx.ir.memory_timeline import flat
from ringfx.ir.plan import LOCAL, REPLICATED, LayerPlan
from ringfx.ir.values import AttentionSite
from ringfx.ops.tiling.head_groups import MOST_GROUPS
from ringfx.strategies import DEFAULT, SPLIT_KV, STRATEGIES, Strategy
from ringfx.units.format import format_budget, format_bytes, format_ms

__all__ = ["choose", "longest_fitting"]


def choose(
    sites: Sequence[AttentionSite],
    *,
    world_size: int,
    profile: Profile,
    gpu_memory: int | None = None,
    strategy: StrategyChoice = AUTO,
    memory: MemoryTimeline | None = None,
    strategies: Mapping[str, Strategy] = STRATEGIES,
    replicated: Mapping[int, str] = MappingProxyType({}),
    few_queries: Collection[int] = (),
    recompute: Recompute = "auto",
    offload: Offload = "auto",
    sharded: Callable[[], MemoryTimeline] | None = None,
    advise: bool = True,
) -> tuple[LayerPlan, ...]:
    """One LayerPlan for each site: the fastest plan of the whole model that fits the budget.

    Parameters
    ----------
    gpu_memory
        Budget of one rank in bytes; None: no limit.
    strategy
        ``"auto"``, a name, or a mapping from globs on module paths to names.
    memory
        What is alive when outside attention, and with it which layers' tensors; None: nothing, and
        all layers' at once.
    strategies
        The table to choose from.
    replicated
        Sites (by their number) that no rank has a part of, and why: each runs whole on every rank,
        and takes the time and memory that it takes on one.
    few_queries
        Sites (by their number) of which every rank has all queries and its own keys.
    recompute
        Which layers backward computes again, of those that ``memory`` says can be.
    offload
        Which of these leave what is kept of them in the host's memory until then.
    sharded
        Makes the timeline with states shared by the ranks, to be named where nothing fits; None:
        they are shared, or cannot be.
    advise
        Whether the error where nothing fits names what would; that may take seconds to find.

    Raises
    ------
    InvalidArgument
        An unknown strategy, or a glob that matches no layer.
    StrategyRefused
        A strategy was asked for where it cannot run, or no strategy can.
    OutOfMemory
        No assignment fits; the text names the world size and the length that would.
    """
    overrides = resolve_overrides(strategy, sites, tuple(strategies))
    offers_at = _offering(
        profile, strategies, replicated, few_queries, 0 if gpu_memory is None else MOST_GROUPS
    )
    free = [None if i in few_queries else override for i, override in enumerate(overrides)]
    problem = _problem(
        sites, world_size, gpu_memory, memory, free, offers_at, replicated, profile,
        Asked(recompute=recompute, offload=offload), sharded,
    )  # fmt: skip
    refuse_hopeless(problem, advise=advise)
    fitting = problem.at(world_size)
    picked = _fastest(fitting, gpu_memory)
    if picked is None:
        raise infeasible(problem, advise=advise)
    offers = offers_at(problem.sites, world_size)
    layers = [
        _layer_plan(offer, menu[i], override, gpu_memory)
        for offer, menu, i, override in zip(offers, fitting.menus, picked, free, strict=True)
    ]
    for i, asked in enumerate(overrides):
        if i in replicated:
            layers[i] = _unasked(layers[i], REPLICATED, f"not split: {replicated[i]}", asked)
        elif sites[i].is_local and world_size > 1:
            layers[i] = _unasked(layers[i], LOCAL, ALONE, asked)
    for i in few_queries:
        q, k = sites[i].q_len, sites[i].kv_len
        few = f"{q:,} {'query' if q == 1 else 'queries'} over {k:,} keys: no key is moved"
        layers[i] = replace(layers[i], reason=f"{few}{_not_as_asked(overrides[i])}")
    return tuple(layers)


def _not_as_asked(override: Override | None) -> str:
    return "" if override is None else f"; {override.words} was requested but cannot run here"


ALONE = "each rank attends to its own part of the batch, without a message"


def _fastest(fitting: Fitting, gpu_memory: int | None) -> Picked | None:
    """The fastest choice that leaves the margin, or at least fits."""
    if gpu_memory is None:
        return fitting.fastest(None)
    picked = fitting.fastest(round((1 - MARGIN) * gpu_memory))
    return fitting.fastest(gpu_memory) if picked is None else picked


Offers: TypeAlias = Callable[[tuple[AttentionSite, ...], int], Sequence[Candidates]]


def _offering(
    profile: Profile,
    strategies: Mapping[str, Strategy],
    replicated: Collection[int],
    few_queries: Collection[int],
    more_groups: int,
) -> Offers:
    """What each site is offered: one that is replicated, what it takes on one rank.

    However many choices ask, the same sites over the same ranks are costed once.
    """

    @cache
    def offers_at(sites: tuple[AttentionSite, ...], world_size: int) -> Sequence[Candidates]:
        found = all_candidates(sites, world_size, profile, strategies, more_groups=more_groups)
        if replicated:
            whole = all_candidates(sites, 1, profile, strategies)
            found = [whole[i] if i in replicated else offer for i, offer in enumerate(found)]
        if few_queries and world_size > 1:
            merged = all_candidates(sites, world_size, profile, {SPLIT_KV.name: SPLIT_KV})
            found = [merged[i] if i in few_queries else offer for i, offer in enumerate(found)]
        return found

    return offers_at


def _problem(
    sites: Sequence[AttentionSite],
    world_size: int,
    gpu_memory: int | None,
    memory: MemoryTimeline | None,
    overrides: Sequence[Override | None],
    offers_at: Offers,
    replicated: Collection[int],
    profile: Profile,
    asked: Asked,
    sharded: Callable[[], MemoryTimeline] | None = None,
) -> Problem:
    def menus_at(sites: tuple[AttentionSite, ...], world_size: int) -> list[Menu]:
        pairs = zip(offers_at(sites, world_size), overrides, strict=True)
        menus = [
            _menu(offer, None, 1)
            if i in replicated or offer.site.is_local
            else _menu(offer, override, world_size)
            for i, (offer, override) in enumerate(pairs)
        ]
        return with_recompute(menus, sites, world_size, counted, asked.recompute, host)

    timeline = flat(sites) if memory is None else memory
    counted = sharded() if sharded is not None and asked.shard_states else timeline
    host = Host.of(profile, asked.offload)
    return Problem(
        sites=tuple(sites), menus=menus_at, world_size=world_size, budget=gpu_memory,
        memory=counted, replicated=frozenset(replicated), asked=asked,
        variant=lambda other: _problem(
            sites, world_size, gpu_memory, timeline, overrides, offers_at, replicated, profile,
            other, sharded,
        ),
        can_shard=sharded is not None and not asked.shard_states,
        knows_host=Host.of(profile, "auto") is not None,
    )  # fmt: skip


def longest_fitting(
    sites: Sequence[AttentionSite],
    *,
    world_size: int,
    profile: Profile,
    gpu_memory: int,
    limit: int,
    strategy: StrategyChoice = AUTO,
    memory: MemoryTimeline | None = None,
    strategies: Mapping[str, Strategy] = STRATEGIES,
    replicated: Collection[int] = (),
    few_queries: Collection[int] = (),
    recompute: Recompute = "auto",
    offload: Offload = "auto",
) -> int:
    """The longest sequence up to ``limit``, to within a token a rank, that ``choose`` could fit;
    0: none."""
    overrides = resolve_overrides(strategy, sites, tuple(strategies))
    offers_at = _offering(profile, strategies, replicated, few_queries, MOST_GROUPS)
    free = [None if i in few_queries else override for i, override in enumerate(overrides)]
    problem = _problem(
        sites, world_size, gpu_memory, memory, free, offers_at, replicated, profile,
        Asked(recompute=recompute, offload=offload),
    )  # fmt: skip
    return longest_that_fits(problem, limit, world_size)


# --- what may be chosen -----------------------------------------------------------------------


def _menu(offer: Candidates, override: Override | None, world_size: int) -> Menu:
    """The options that the user's word leaves; at one rank there is just the local kernel."""
    if override is not None:
        if override.strategy in offer.refused:
            raise StrategyRefused(_refusal(offer, override))
        return tuple(o for o in offer.options if o.strategy == override.strategy)
    if not offer.options:
        raise StrategyRefused(_no_strategy(offer, world_size))
    if offer.local_only:
        local = tuple(o for o in offer.options if o.strategy == DEFAULT)
        return local or offer.options[:1]
    return offer.options


def _refusal(offer: Candidates, override: Override) -> str:
    refusal = offer.refused[override.strategy]
    names = ", ".join(sorted({option.strategy_words for option in offer.options})) or "none"
    cheapest = ""
    if offer.options:
        best = offer.options[0]
        cheapest = f" Cheapest: {best.strategy_words}, predicted {format_ms(best.total_ms)}."
    drop = f"drop the override for {override.glob}" if override.glob else f"drop {override.words}"
    return (
        f"{_where(offer.site)}: {_named(override.strategy, refusal.reason)}.\n"
        f"  Admissible: {names}.{cheapest}\n"
        f"  Do: {drop}, or {refusal.remedy}."
    )


def _no_strategy(offer: Candidates, world_size: int) -> str:
    lines = [f"  {_named(n, no.reason)}. Do: {no.remedy}." for n, no in offer.refused.items()]
    head = f"{_where(offer.site)}: no strategy can split it over {world_size} ranks."
    return "\n".join([head, *lines])


def _named(strategy: str, reason: str) -> str:
    """The reason as a sentence that says which strategy it is about."""
    return reason if f'"{strategy}"' in reason else f'"{strategy}" cannot run here: {reason}'


def _where(site: AttentionSite) -> str:
    return f'{site.name} ({site.source}, found as "{site.found_by}")'


# --- the plan of a layer ------------------------------------------------------------------------


def _layer_plan(
    offer: Candidates, chosen: Prediction, override: Override | None, gpu_memory: int | None
) -> LayerPlan:
    return LayerPlan(
        site=offer.site,
        strategy=chosen.strategy,
        reason=_reason(offer, chosen, override, gpu_memory),
        kernel=chosen.kernel,
        forward_ms=chosen.forward_ms,
        backward_ms=chosen.backward_ms,
        compute_ms=chosen.compute_ms,
        communication_ms=chosen.communication_ms,
        exposed_ms=chosen.exposed_ms,
        saved_bytes=chosen.saved_bytes,
        result_bytes=chosen.result_bytes,
        workspace_bytes=chosen.workspace_bytes,
        own_queries=chosen.own_queries,
        gloss=chosen.gloss,
        head_groups=chosen.head_groups,
        recomputed=chosen.recomputed,
        attention_again=chosen.attention_again,
        again_ms=chosen.again_ms,
        offloaded=chosen.offloaded,
        host_bytes=chosen.host_bytes,
        host_result_bytes=chosen.host_result_bytes,
        offload_ms=chosen.offload_ms,
    )


def _unasked(layer: LayerPlan, word: str, reason: str, asked: Override | None) -> LayerPlan:
    """The layer with a word in place of a strategy, as there is none to choose."""
    reason = f"{reason}{_not_as_asked(asked)}"
    return replace(layer, strategy=word, reason=reason, own_queries=False, gloss="")


def _reason(
    offer: Candidates, chosen: Prediction, override: Override | None, gpu_memory: int | None
) -> str:
    reason = _reason_of_strategy(offer, chosen, override, gpu_memory)
    if not chosen.head_groups or offer.local_only:
        return reason
    alike = [o for o in offer.options if o.strategy == chosen.strategy and not o.head_groups]
    why = "" if not alike else f", with {_more_memory(alike[0], chosen)} less"
    return f"{reason}; in up to {chosen.head_groups} groups of heads{why}"


def _reason_of_strategy(
    offer: Candidates, chosen: Prediction, override: Override | None, gpu_memory: int | None
) -> str:
    if offer.local_only and override is None:
        return "one rank: the local kernel"
    others = [o for o in offer.options if o.strategy != chosen.strategy]
    if override is not None:
        return f"requested by {override.words}{_if_slower(chosen, others)}"
    if not others:
        return "the only one that can run here"
    best = others[0]
    if best.total_ms >= chosen.total_ms:
        fastest = f"fastest of {len({o.strategy for o in offer.options})}"
        tie = ", a tie within the noise" if best.total_ms < offer.noise * chosen.total_ms else ""
        return f"{fastest}; next {best.strategy_words}, {_percent(best, chosen)} slower{tie}"
    assert gpu_memory is not None, "without a budget the fastest is chosen"
    return (
        f"fastest that fits {format_budget(gpu_memory)}; {best.strategy_words} would be"
        f" {_percent(chosen, best)} faster with {_more_memory(best, chosen)} more"
    )


def _if_slower(chosen: Prediction, others: Sequence[Prediction]) -> str:
    if not others or others[0].total_ms >= chosen.total_ms:
        return ""
    return f"; {others[0].strategy_words} is predicted {_percent(chosen, others[0])} faster"


def _percent(slow: Prediction, fast: Prediction) -> str:
    """How much longer the slow one takes, as a share of the fast one's time."""
    ratio = slow.total_ms / fast.total_ms
    if ratio >= 2:
        return f"{ratio:.1f} times"
    return f"{100 * (ratio - 1):.0f}%" if ratio >= 1.01 else "under 1%"


def _more_memory(large: Prediction, small: Prediction) -> str:
    def total(p: Prediction) -> int:
        return p.saved_bytes + p.workspace_bytes

    return format_bytes(max(0, total(large) - total(small)))
