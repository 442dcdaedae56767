"""What a user may ask of ringfx, checked once where it enters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringfx.comm.world import several_processes
from ringfx.cost_model import Profile, StrategyChoice, parse_bytes
from ringfx.cost_model.choice.layers_again import OFFLOAD, RECOMPUTE, Offload, Recompute
from ringfx.cost_model.peak_memory.optimizers import check_optimizer
from ringfx.cost_model.prediction.profile import check_profile, check_profile_type
from ringfx.errors import InvalidArgument
from ringfx.ops.tiling.head_groups import MOST_GROUPS
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES, checked_rules
from ringfx.passes.chunks.sizes import Chunks
from ringfx.strategies import STRATEGIES, Strategy
from ringfx.strategies.given import checked_strategies

__all__ = ["Compiler", "OnUnsupported", "Outputs", "Settings"]

Compiler = Literal["inductor", "aot_eager", "eager"]
Outputs = Literal["global", "local"]
OnUnsupported = Literal["error", "gather"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of ``ringfx.optimize`` and of the ``ringfx`` backend."""

    strategy: StrategyChoice = "auto"
    gpu_memory: int | None = None
    profile: str | Profile | None = None
    optimizer: str | int = "none"
    """Whose state counts against ``gpu_memory``."""
    compiler: Compiler = "inductor"
    outputs: Outputs = "global"
    on_unsupported: OnUnsupported = "error"
    check_inputs: bool | int = True
    """Compare inputs and parameters across ranks; a number: all parameters in so many calls."""
    strict: bool = False
    """Refuse a model in which something looks like attention and is neither found nor explained."""
    shard_states: Any = False
    """Each rank holds its rows of every parameter, and of its gradient: True for the ranks of the
    sequence; a mesh of more; of a plan that is made offline, how many ranks."""
    mp_policy: Any = None
    """The types that sharded parameters and their gradients are sent in."""
    chunks: Chunks = "auto"
    """Which regions run in chunks of tokens."""
    recompute: Recompute = "auto"
    """Which layers backward computes again, attention apart."""
    offload: Offload = "auto"
    """Which of them leave what they keep in the host's memory until then."""
    head_groups: int | str = "auto"
    """Groups of heads that strategies work through one after the other."""
    strategies: Mapping[str, Strategy] = field(default_factory=lambda: STRATEGIES)
    """To choose from."""
    rules: AxisRules = field(default_factory=lambda: RULES)
    """What operators do along their axes."""

    @staticmethod
    def of(options: Mapping[str, Any]) -> Settings:
        """From keyword options, each checked.

        Raises
        ------
        InvalidArgument
            For an unknown option or value; the text lists the choices.
        """
        known = [f.name for f in fields(Settings)]
        for name in options:
            if name not in known:
                raise InvalidArgument(
                    f"unknown option {name!r}. Options: mesh, {', '.join(known)}."
                )
        given = dict(options)
        for name, checked in (("strategies", checked_strategies), ("rules", checked_rules)):
            if name in given:
                given[name] = checked(given[name])
        if given.get("gpu_memory") is not None:
            given["gpu_memory"] = parse_bytes(given["gpu_memory"])
        settings = Settings(**given)
        _check_choice("compiler", settings.compiler, get_args(Compiler))
        _check_choice("recompute", settings.recompute, RECOMPUTE)
        _check_choice("offload", settings.offload, OFFLOAD)
        _check_choice("outputs", settings.outputs, get_args(Outputs))
        _check_choice("on_unsupported", settings.on_unsupported, get_args(OnUnsupported))
        check_profile_type(settings.profile)
        if not several_processes():  # of several ranks only rank 0 must have it: all are told
            check_profile(settings.profile)
        _check_states(settings.shard_states, settings.mp_policy)
        _check_interval(settings.check_inputs)
        _check_chunks(settings.chunks)
        _check_head_groups(settings.head_groups)
        if not isinstance(settings.strict, bool):
            raise InvalidArgument(f"strict={settings.strict!r} is neither True nor False.")
        _check_strategy(settings.strategy, settings.strategies)
        check_optimizer(settings.optimizer)
        return settings if settings.head_groups == "auto" else _in_groups(settings)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise InvalidArgument(f"{name}={value!r} is not one of {listed}.")


def _check_states(shard_states: object, policy: object) -> None:
    if not isinstance(shard_states, int | DeviceMesh | dist.ProcessGroup):
        raise InvalidArgument(
            f"shard_states={shard_states!r} is none of True, False, a DeviceMesh and a group."
        )
    if policy is None:
        return
    names = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")
    if not all(hasattr(policy, name) for name in names):
        raise InvalidArgument(
            f"mp_policy={policy!r} is no torch.distributed.fsdp.MixedPrecisionPolicy."
        )
    if shard_states is False:
        raise InvalidArgument(
            "mp_policy says how sharded states are sent, but shard_states is False. Do: pass "
            "shard_states=True too; without sharding use torch.autocast."
        )
    output_dtype = getattr(policy, names[2])
    if output_dtype is not None:
        raise InvalidArgument(
            f"mp_policy: output_dtype={output_dtype} is not supported. Do: leave it out, and "
            "convert what the model returns."
        )


def _check_interval(value: object) -> None:
    if not isinstance(value, int) or value < 0:
        raise InvalidArgument(
            f"check_inputs={value!r} must be True, False, or a number N (all parameters are "
            "compared once in N calls)."
        )


def _check_chunks(value: object) -> None:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value not in ("auto", "all", "none") and not is_number:
        raise InvalidArgument(
            f"chunks={value!r} is none of 'auto', 'all', 'none' and a number of tokens, such as "
            "1024."
        )


def _check_head_groups(value: object) -> None:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value != "auto" and not (is_number and value in range(1, MOST_GROUPS + 1)):
        raise InvalidArgument(
            f"head_groups={value!r} is neither 'auto' nor a number of groups from 1 to "
            f"{MOST_GROUPS}."
        )


def _in_groups(settings: Settings) -> Settings:
    asked = {k: s.in_groups(int(settings.head_groups)) for k, s in settings.strategies.items()}
    return replace(settings, strategies=asked)


def _check_strategy(strategy: object, strategies: Mapping[str, Strategy]) -> None:
    """Unknown names are refused at once, not when the model first runs."""
    names = ("auto", *strategies)
    if isinstance(strategy, Mapping) and not all(isinstance(glob, str) for glob in strategy):
        raise InvalidArgument(
            "strategy: the keys of a mapping must be strings (globs of module paths)."
        )
    asked = strategy.values() if isinstance(strategy, Mapping) else (strategy,)
    for name in asked:
        if name not in names:
            raise InvalidArgument(
                f"unknown strategy {name!r}. Strategies: {', '.join(names)}; or "
                "a mapping from globs of module paths to these names."
            )
