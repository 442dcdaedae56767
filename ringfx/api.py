"""The public functions: ``optimize`` a model to run it, ``plan`` it without running it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from ringfx.comm.stats_table import Stats
from ringfx.comm.world import World
from ringfx.compile.backend import lower_naming_internal_errors, no_attention_text
from ringfx.compile.on_fakes import PlanMade, trace, trained
from ringfx.compile.optimized import Optimized, optimized
from ringfx.compile.planned_arrivals import arrived, leave_split, run_whole
from ringfx.compile.settings import Compiler, OnUnsupported, Outputs, Settings
from ringfx.compile.states import cast_inputs, planned_states
from ringfx.cost_model import StrategyChoice
from ringfx.cost_model.choice.infeasible import refuse_parameters
from ringfx.cost_model.choice.layers_again import Offload, Recompute
from ringfx.errors import AttentionNotFound, InvalidArgument
from ringfx.ir.note import noted
from ringfx.ir.plan import Plan, joined
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES
from ringfx.passes.capture.breaks import is_outermost, reads_gradients
from ringfx.passes.capture.trace import name_arguments
from ringfx.passes.chunks.sizes import Chunks
from ringfx.strategies import STRATEGIES, Strategy
from ringfx.torch_compat.dynamo import OptimizedModule
from ringfx.torch_compat.graphs import has_hooks
from ringfx.units.parse import MOST_RANKS
from ringfx.validation.arguments import whole_number
from ringfx.validation.names import misfit, named_arguments
from ringfx.watch.stages import stage_done

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["Optimized", "offline", "optimize", "plan", "stats"]

M = TypeVar("M", bound=torch.nn.Module)


@named_arguments
def optimize(
    model: M,
    *,
    mesh: Any = None,
    strategy: StrategyChoice = "auto",
    gpu_memory: int | str | None = None,
    profile: str | None = None,
    optimizer: str | int = "none",
    compiler: Compiler = "inductor",
    dynamic: bool = False,
    outputs: Outputs = "global",
    on_unsupported: OnUnsupported = "error",
    check_inputs: bool | int = True,
    strict: bool = False,
    shard_states: bool | DeviceMesh = False,
    mp_policy: MixedPrecisionPolicy | None = None,
    chunks: Chunks = "auto",
    recompute: Recompute = "auto",
    offload: Offload = "auto",
    head_groups: int | str = "auto",
    token_dims: Mapping[str, int] | None = None,
    strategies: Mapping[str, Strategy] = STRATEGIES,
    rules: AxisRules = RULES,
) -> M:
    """The same model with its sequence split over the ranks of ``mesh``.

    Every rank calls it with the same full inputs. Every rank gets the outputs and the complete
    gradients of the unsplit model.

    Parameters
    ----------
    model
        Any module with attention over a sequence. It is not changed; parameters are shared with it.
    mesh
        A one-dimensional DeviceMesh or a process group. Default: all ranks, or one rank if
        torch.distributed is not initialised. With data parallelism beside it, pass one dimension of
        the mesh (``mesh["sp"]``), and the group of the other one to DistributedDataParallel, around
        the optimized model or inside it. Gradients are summed over the sequence's ranks, so that
        they are complete, and averaged over the others, as DistributedDataParallel does.
    strategy
        ``"auto"``; a name of ``strategies``, of ringfx's own ``simple`` (reference ring),
        ``collective`` (all-gather of K/V), ``production`` (overlapped ring) and ``ulysses``
        (all-to-all of heads); or a mapping from globs of module paths to these names.
    gpu_memory
        Budget of one rank, in bytes or as ``"80GiB"``.
    profile
        Name or path of a measurement profile. Default: the one of this device.
    optimizer
        The optimizer whose state counts against ``gpu_memory``: ``"adamw"``, ``"momentum"``,
        ``"sgd"``, ..., or bytes of state for each parameter. Default: none; the plan notes it.
    compiler
        ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
    dynamic
        For data of varying length: one program is captured for all lengths, and few are compiled.
        A length that none of them serves exactly gets its own, which is announced. Losses do not
        run in chunks then (also announced), unless ``chunks`` or ``gpu_memory`` asks for it.
    outputs
        ``"global"``: sharded outputs have the global shape and are gathered when used.
        ``"local"``: each rank gets its own shard, with ``ringfx_positions``.
    on_unsupported
        For an operator without an axis rule: ``"error"``, or ``"gather"`` its inputs and replicate
        it.
    check_inputs
        Compare checksums between ranks. Inputs are compared on every call. All parameters and float
        buffers are compared on a program's first call, then a part of them on each call that keeps
        gradients, so that all are compared once in 100 calls (in N calls for a number N). Of
        sharded parameters the optimizer's steps and settings are compared on every call.
        ``False``: never.
    strict
        Refuse a model with a region that looks like attention, by a count that is independent of
        detection, and was neither found nor declined nor split by rows of scores (AttentionMissed);
        and a model with an attention that was found and cannot be split (AttentionReplicated).
    shard_states
        Parameters become DTensors in the model itself, each cut by its first dimension over the
        sequence's ranks; their gradients and the optimizer's state are cut with them. A parameter
        is gathered just before it is used, and again in backward. Make the optimizer afterwards.
        A DeviceMesh (``mesh["dp_shard", "cp"]``): over its ranks, which contain the sequence's. A
        gradient is then summed over the sequence's ranks and averaged over the data parallel ones.
    mp_policy
        For sharded states, torch's ``MixedPrecisionPolicy``, as ``fully_shard`` takes it: the type
        in which parameters are gathered and used (``param_dtype``; floating-point inputs are
        converted too), and that in which gradients are sent and summed (``reduce_dtype``). Rows,
        their gradients and the optimizer's state stay in the type of the model.
    chunks
        Parts of the model that compute each token by itself, and are wide, run in chunks of tokens:
        what is wide (logits, an MLP's inner values) then exists for one chunk only. ``"auto"``:
        where nothing is computed again (losses), and everywhere if ``gpu_memory`` is exceeded
        otherwise; ``"all"``; ``"none"``; or a number of tokens for each chunk, everywhere.
    recompute
        Layers whose inner values are computed again in backward instead of kept. ``"auto"``: as
        many as ``gpu_memory`` demands, without their attention as long as that is enough;
        ``"layers"``: all, without attention; ``"attention"``: all, with it (its messages are sent
        again); ``"none"``. Layers that the model itself checkpoints stay as they are.
    offload
        What layers that are computed again still keep, the hidden states between them and their
        attention's output, waits in the host's memory. ``"auto"``: as much as ``gpu_memory``
        demands, where the profile knows the host; ``"all"``; ``"none"``.
    head_groups
        Attention works through its heads in groups, so that what is gathered or exchanged exists
        for one group only. ``"auto"``: as many as cost no time, and more where ``gpu_memory`` is
        exceeded otherwise; or a number from 1 to 8 (fewer where the heads cannot be parted so).
    token_dims
        For a model without attention: which dimension holds the tokens, by names of inputs:
        ``{"x": 2}``. Default: found, and announced.
    strategies
        Those to choose from. With one of your own: ``ringfx.STRATEGIES | {"mine": mine}``, a
        ``ringfx.Strategy``.
    rules
        What operators do along their axes. With one of your own: ``ringfx.RULES |
        {torch.ops.my.op.default: rule}``.

    Raises
    ------
    InvalidArgument
        At once, for an argument that cannot be used; later errors are raised by the first call.
    """
    if not isinstance(model, torch.nn.Module):
        raise InvalidArgument(
            f"model must be a torch.nn.Module, not {type(model).__name__}. Do: pass the module "
            "itself, such as ringfx.optimize(model)."
        )
    if isinstance(model, OptimizedModule):
        raise InvalidArgument(
            "model is already compiled by torch.compile. Do: pass the original model; ringfx "
            "compiles it itself (option compiler)."
        )
    _refuse_nested(model)
    settings = Settings.of(
        {
            "strategy": strategy,
            "gpu_memory": gpu_memory,
            "profile": profile,
            "optimizer": optimizer,
            "compiler": compiler,
            "dynamic": dynamic,
            "outputs": outputs,
            "on_unsupported": on_unsupported,
            "check_inputs": check_inputs,
            "strict": strict,
            "shard_states": shard_states,
            "mp_policy": mp_policy,
            "chunks": chunks,
            "recompute": recompute,
            "offload": offload,
            "head_groups": head_groups,
            "token_dims": token_dims or {},
            "strategies": strategies,
            "rules": rules,
        }
    )
    return optimized(model, settings, mesh)


def _refuse_nested(model: torch.nn.Module) -> None:
    """A part that is compiled by itself would break the whole model's program around it."""
    outer = {model, model.module} if isinstance(model, DistributedDataParallel) else {model}
    for name, part in model.named_modules():
        if part not in outer and isinstance(part, (Optimized, OptimizedModule)):
            raise InvalidArgument(
                f"{name} is already compiled (by ringfx.optimize or torch.compile), but ringfx "
                "compiles the complete model. Do: optimize either the model or its parts; pass "
                "modules that are not compiled."
            )


@named_arguments
def stats(model: torch.nn.Module) -> Stats:
    """What each attention of an optimized model has done on this rank so far, by module path.

    A mapping; printed it is a table of one call of each layer, and of what was sent outside them.

    Counters of kernel calls, messages, bytes sent and tiles that were halved are always on;
    seconds of compute and of waiting are taken only inside ``with ringfx.ops.timed():``. Models
    whose layers have equal paths share counters; ``ringfx.ops.reset_stats()`` starts anew.

    Raises
    ------
    InvalidArgument
        If the model does not come from ``ringfx.optimize``.
    """
    if not isinstance(model, Optimized):
        raise InvalidArgument(
            f"stats: {type(model).__name__} does not come from ringfx.optimize. Do: pass the "
            "model that ringfx.optimize returned."
        )
    names = {layer.name for plan in model._ringfx_shared.backend.plans for layer in plan.layers}
    return Stats.of(names)


@named_arguments
def plan(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    world_size: int,
    gpu_memory: int | str | None = None,
    profile: str | None = None,
    optimizer: str | int = "none",
    strategy: StrategyChoice = "auto",
    on_unsupported: OnUnsupported = "error",
    strict: bool = False,
    shard_states: bool | int = False,
    mp_policy: MixedPrecisionPolicy | None = None,
    chunks: Chunks = "auto",
    recompute: Recompute = "auto",
    offload: Offload = "auto",
    head_groups: int | str = "auto",
    compiler: Compiler = "inductor",
    token_dims: Mapping[str, int] | None = None,
    strategies: Mapping[str, Strategy] = STRATEGIES,
    rules: AxisRules = RULES,
) -> Plan:
    """What ``optimize`` would do on ``world_size`` ranks, without running a tensor.

    No process group and no accelerator is needed. The model and its inputs may be real, on
    ``meta``, or fake (see ``ringfx.api.offline``). ``shard_states`` is True, or the number of ranks
    that share the states where that is more than ``world_size``.

    Raises
    ------
    RingfxError
        Whatever ``optimize`` would raise for this model.
    """
    check_call("plan", model, args, kwargs)
    world_size = whole_number("plan", "world_size", world_size, most=MOST_RANKS)
    settings = Settings.of(
        {
            "strategy": strategy,
            "gpu_memory": gpu_memory,
            "profile": profile,
            "optimizer": optimizer,
            "on_unsupported": on_unsupported,
            "strict": strict,
            "shard_states": shard_states,
            "mp_policy": mp_policy,
            "chunks": chunks,
            "recompute": recompute,
            "offload": offload,
            "head_groups": head_groups,
            "compiler": compiler,
            "token_dims": token_dims or {},
            "strategies": strategies,
            "rules": rules,
        }
    )
    refuse_parameters(
        model.parameters(), None if shard_states else settings.gpu_memory, settings.optimizer,
        world_size, trained=lambda: trained(model, args, dict(kwargs or {})),
    )  # fmt: skip
    world = World(world_size, 0, "ringfx" if world_size > 1 else "")
    states = planned_states(shard_states, world, dict(model.named_parameters()), mp_policy)
    args, kwargs = cast_inputs((args, dict(kwargs or {})), states, mp_policy)
    plans: list[Plan] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        if reads_gradients(gm):
            return gm.forward
        stage_done("traced")
        name_arguments(gm, model.forward)
        arrivals = arrived(example_inputs)
        lowered = lower_naming_internal_errors(
            gm, example_inputs, settings, world, arrivals, states
        )
        if lowered.captured.graph_break is None and is_outermost():
            plans.append(lowered.plan)
            raise PlanMade

        def run(*inputs: Any) -> Any:
            plans.append(lowered.plan)  # a program may run several times
            return leave_split(run_whole(gm, inputs), lowered.local)

        return run

    stopped = trace(model, args, kwargs, backend, states)
    if not any(p.has_tokens for p in plans):
        raise AttentionNotFound(no_attention_text(plans))
    whole = joined(plans)
    return dataclasses.replace(whole, notes=(*whole.notes, *noted(stopped)))


def check_call(where: str, model: object, args: object, kwargs: object) -> None:
    """Check the arguments of an offline call.

    Raises
    ------
    InvalidArgument
        If it is not a module, a tuple of arguments and a mapping of keywords, or if they are not
        those of ``forward``.
    """
    if not isinstance(model, torch.nn.Module):
        raise InvalidArgument(
            f"{where}: model must be a torch.nn.Module, not {type(model).__name__}. Do: pass the "
            f"module itself, such as ringfx.{where}(model, ...)."
        )
    if isinstance(model, OptimizedModule):
        raise InvalidArgument(
            "model is already compiled by torch.compile. Do: pass the original model."
        )
    if not isinstance(args, tuple | list):
        raise InvalidArgument(f"args is a {type(args).__name__}. Do: pass a tuple of arguments.")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InvalidArgument(f"kwargs is a {type(kwargs).__name__}. Do: pass a mapping.")
    if wrong := [name for name in kwargs or () if not isinstance(name, str)]:
        raise InvalidArgument(
            f"kwargs has the key {wrong[0]!r}, which is not a string. Do: use the names of "
            "arguments as keys."
        )
    if not has_hooks(model) and (reason := misfit(model.forward, args, kwargs or {})):
        raise InvalidArgument(
            f"{where}: {type(model).__name__}.forward: {reason}. Do: give the inputs of one call, "
            f"as {type(model).__name__} takes them."
        )


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Build models and inputs of any size here: their tensors have shapes and no storage."""
    with torch.device("meta"):
        yield
