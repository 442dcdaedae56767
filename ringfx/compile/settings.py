"""What a user may ask of ringfx, checked once where it enters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringfx.comm.world import several_machines, several_processes
from ringfx.cost_model import Profile, StrategyChoice, parse_bytes
from ringfx.cost_model.choice.layers_again import OFFLOAD, RECOMPUTE, Offload, Recompute
from ringfx.cost_model.peak_memory.optimizers import check_optimizer
from ringfx.cost_model.prediction.profile import check_profile, check_profile_type, is_path
from ringfx.errors import InvalidArgument
from ringfx.ops.tiling.head_groups import MOST_GROUPS
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES, checked_rules
from ringfx.passes.chunks.sizes import Chunks
from ringfx.strategies import STRATEGIES, Strategy, planned_with
from ringfx.strategies.given import checked_strategies
from ringfx.units.argument import Argument, Code
from ringfx.validation.names import unknown_option

__all__ = ["Compiler", "OnUnsupported", "Outputs", "Settings"]

Compiler = Literal["inductor", "aot_eager", "eager"]
Outputs = Literal["global", "local"]
OnUnsupported = Literal["error", "gather"]


_BY_NAME = Code("{'x': 2}", "x=2")
_BY_GLOB = Code('{"model.layers.0.*": "collective"}', option='"model.layers.0.*=collective"')


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
    dynamic: bool = False
    """Whether one program serves a range of lengths."""
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
    token_dims: Mapping[str, int] = field(default_factory=dict)
    """Without attention: the dimension of tokens of inputs, by their names; empty: found."""
    strategies: Mapping[str, Strategy] = field(default_factory=lambda: STRATEGIES)
    """To choose from."""
    rules: AxisRules = field(default_factory=lambda: RULES)
    """What operators do along their axes."""

    @property
    def nameable(self) -> Mapping[str, Strategy]:
        """The strategies that a layer of a plan may name."""
        return planned_with(self.strategies)

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
                raise unknown_option(name, ("mesh", *known))
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
        # Rank 0's is told to all: it alone must have a file, or its machine a profile of a name.
        if not (several_processes() if is_path(settings.profile) else several_machines()):
            check_profile(settings.profile)
        _check_states(settings.shard_states, settings.mp_policy)
        _check_interval(settings.check_inputs)
        _check_chunks(settings.chunks)
        _check_head_groups(settings.head_groups)
        _check_token_dims(settings.token_dims)
        for name in ("strict", "dynamic"):
            value = getattr(settings, name)
            if not isinstance(value, bool):
                raise InvalidArgument(f"{Argument(name, value)}. Do: pass True or False.")
        _check_strategy(settings.strategy, settings.strategies)
        check_optimizer(settings.optimizer)
        return settings if settings.head_groups == "auto" else _in_groups(settings)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(choices)
        raise InvalidArgument(f"{Argument(name, value)} is unknown. Do: use one of {listed}.")


def _check_states(shard_states: object, policy: object) -> None:
    if not isinstance(shard_states, int | DeviceMesh | dist.ProcessGroup):
        raise InvalidArgument(
            f"{Argument('shard_states', shard_states)}. Do: pass True or False, or the "
            "DeviceMesh or group of the ranks that share the states."
        )
    if policy is None:
        return
    names = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")
    if not all(hasattr(policy, name) for name in names):
        raise InvalidArgument(
            f"{Argument('mp_policy', policy)}. Do: pass one of torch.distributed.fsdp, such as "
            "MixedPrecisionPolicy(param_dtype=torch.bfloat16)."
        )
    if shard_states is False:
        raise InvalidArgument(
            f"{Argument('mp_policy')} says how sharded states are sent, but they are not sharded. "
            f"Do: pass {Argument('shard_states', True)} too; without sharding use autocast."
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
            f"{Argument('check_inputs', value)}. Do: pass True, False, or a number N (all "
            "parameters are compared once in N calls)."
        )


def _check_chunks(value: object) -> None:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value not in ("auto", "all", "none") and not is_number:
        raise InvalidArgument(
            f"{Argument('chunks', value)} is unknown. Do: use auto, all or none, or a number of "
            f"tokens, such as {Argument('chunks', 1024)}."
        )


def _check_head_groups(value: object) -> None:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if value != "auto" and not (is_number and value in range(1, MOST_GROUPS + 1)):
        raise InvalidArgument(
            f"{Argument('head_groups', value)} is unknown. Do: use auto, or a number of groups "
            f"from 1 to {MOST_GROUPS}, such as {Argument('head_groups', 2)}."
        )


def _check_token_dims(value: object) -> None:
    pairs = list(value.items()) if isinstance(value, Mapping) else [(None, None)]
    if not all(isinstance(k, str) and type(dim) is int for k, dim in pairs):
        raise InvalidArgument(
            f"{Argument('token_dims', value)} is no mapping from names of inputs to dimensions. "
            f"Do: pass one such as {Argument('token_dims', _BY_NAME)}."
        )


def _in_groups(settings: Settings) -> Settings:
    asked = {k: s.in_groups(int(settings.head_groups)) for k, s in settings.strategies.items()}
    return replace(settings, strategies=asked)


def _check_strategy(strategy: object, strategies: Mapping[str, Strategy]) -> None:
    """Unknown names are refused at once, not when the model first runs."""
    names = ("auto", *strategies)
    if isinstance(strategy, Mapping) and not all(isinstance(glob, str) for glob in strategy):
        raise InvalidArgument(
            "strategy: a key of the mapping is no string. Do: use globs of module paths, such as "
            f"{Argument('strategy', _BY_GLOB)}."
        )
    known = ", ".join(f"{s.name} ({s.gloss})" for s in strategies.values())
    asked = strategy.values() if isinstance(strategy, Mapping) else (strategy,)
    for name in asked:
        if name not in names:
            raise InvalidArgument(
                f"unknown strategy {name!r}. Do: use auto (the fastest that fits), {known}; or "
                f"name them for globs of module paths, {Argument('strategy', _BY_GLOB)}."
            )
