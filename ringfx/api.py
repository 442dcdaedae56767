"""The public functions: ``optimize`` a model to run it, ``plan`` it without running it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from ringfx.comm.state_ranks import ONE_RANK, StateRanks
from ringfx.comm.stats import LayerStats, snapshot
from ringfx.comm.world import World
from ringfx.compile.backend import lower_naming_internal_errors, no_attention_text
from ringfx.compile.dynamo import compiled
from ringfx.compile.given_values import GivenMode
from ringfx.compile.optimized import Optimized, optimized
from ringfx.compile.planned_arrivals import arrived, leave_split, run_whole
from ringfx.compile.settings import Compiler, OnUnsupported, Outputs, Settings
from ringfx.compile.states import cast_inputs, in_param_dtype, planned_states
from ringfx.compile.trained import leaves_of_graph
from ringfx.cost_model import StrategyChoice
from ringfx.cost_model.choice.infeasible import refuse_parameters
from ringfx.cost_model.choice.layers_again import Offload, Recompute
from ringfx.errors import AttentionNotFound, CaptureRefused, InvalidArgument, RingfxError
from ringfx.ir.note import noted
from ringfx.ir.plan import Plan, joined
from ringfx.passes.axes.call import AxisRules
from ringfx.passes.axes.rules import RULES
from ringfx.passes.capture.breaks import is_outermost, reads_gradients
from ringfx.passes.capture.trace import keep_value
from ringfx.passes.chunks.sizes import Chunks
from ringfx.strategies import STRATEGIES, Strategy
from ringfx.torch_compat.dynamo import BackendCompilerFailed, OptimizedModule, TorchDynamoException
from ringfx.torch_compat.fake_tensors import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    as_fake,
)
from ringfx.torch_compat.pytree import keystr, tree_leaves, tree_map_with_path
from ringfx.torch_compat.releases import ISOLATED
from ringfx.units.parse import MOST_RANKS
from ringfx.validation.arguments import whole_number

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["Optimized", "offline", "optimize", "plan", "stats"]

M = TypeVar("M", bound=torch.nn.Module)


def optimize(
    model: M,
    *,
    mesh: Any = None,
    strategy: StrategyChoice = "auto",
    gpu_memory: int | str | None = None,
    profile: str | None = None,
    optimizer: str | int = "none",
    compiler: Compiler = "inductor",
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
    outputs
        ``"global"``: sharded outputs have the global shape and are gathered when used.
        ``"local"``: each rank gets its own shard, with ``ringfx_positions``.
    on_unsupported
        For an operator without an axis rule: ``"error"``, or ``"gather"`` its inputs and replicate
        it.
    check_inputs
        Compare checksums between ranks. Inputs are compared on every call. All parameters and float
        buffers are compared on a program's first call, then a part of them on each call that keeps
        gradients, so that all are compared once in 100 calls (in N calls for a number N).
        ``False``: never.
    strict
        Refuse a model with a region that looks like attention, by a count that is independent of
        detection, and was neither found nor declined (AttentionMissed); and a model with an
        attention that was found and cannot be split (AttentionReplicated).
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
        raise InvalidArgument(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, OptimizedModule):
        raise InvalidArgument(
            "model is already compiled by torch.compile. Do: pass the original model; ringfx "
            "compiles it itself (option compiler=)."
        )
    _refuse_nested(model)
    settings = Settings.of(
        {
            "strategy": strategy,
            "gpu_memory": gpu_memory,
            "profile": profile,
            "optimizer": optimizer,
            "compiler": compiler,
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


def stats(model: torch.nn.Module) -> dict[str, LayerStats]:
    """What each attention of an optimized model has done on this rank so far, by module path.

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
    return {name: found for name, found in snapshot().items() if name in names}


class Planned(Exception):
    """Stops the model once its plan is made."""


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
            "strategies": strategies,
            "rules": rules,
        }
    )
    refuse_parameters(
        model.parameters(), None if shard_states else settings.gpu_memory, settings.optimizer,
        world_size, trained=lambda: _trained(model, args, dict(kwargs or {})),
    )  # fmt: skip
    world = World(world_size, 0, "ringfx" if world_size > 1 else "")
    states = planned_states(shard_states, world, dict(model.named_parameters()), mp_policy)
    args, kwargs = cast_inputs((args, dict(kwargs or {})), states, mp_policy)
    plans: list[Plan] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        if reads_gradients(gm):
            return gm.forward
        arrivals = arrived(example_inputs)
        lowered = lower_naming_internal_errors(
            gm, example_inputs, settings, world, arrivals, states
        )
        if lowered.captured.graph_break is None and is_outermost():
            plans.append(lowered.plan)
            raise Planned

        def run(*inputs: Any) -> Any:
            plans.append(lowered.plan)  # a program may run several times
            return leave_split(run_whole(gm, inputs), lowered.local)

        return run

    stopped = trace(model, args, kwargs, backend, states)
    if not sum(len(p.layers) for p in plans):
        raise AttentionNotFound(no_attention_text(plans))
    whole = joined(plans)
    return dataclasses.replace(whole, notes=(*whole.notes, *noted(stopped)))


def check_call(where: str, model: object, args: object, kwargs: object) -> None:
    """Check the arguments of an offline call.

    Raises
    ------
    InvalidArgument
        If it is not a module, a tuple of arguments and a mapping of keywords.
    """
    if not isinstance(model, torch.nn.Module):
        raise InvalidArgument(
            f"{where}: model must be a torch.nn.Module, not {type(model).__name__}"
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


def trace(
    model: torch.nn.Module, args: Any, kwargs: Any, backend: Any, states: StateRanks = ONE_RANK
) -> tuple[str, ...]:
    """Run the model on fake tensors; returns notes, such as where it could not continue.

    Programs that the process has compiled stay. Programs traced here have a backend of their own
    and are freed with the model's fake copy.
    """
    model = model._ringfx_inner if isinstance(model, Optimized) else model
    mode = _mode_of(model, args, kwargs)
    notes = mode.notes if isinstance(mode, GivenMode) else {}
    fake_model, fake_args, fake_kwargs = _as_fake(mode, model, args, kwargs)
    in_param_dtype(fake_model, states)
    if not ISOLATED:
        torch.compiler.reset()
    traced = compiled(fake_model, backend)
    try:
        with mode:
            traced(*fake_args, **fake_kwargs)  # type: ignore[no-untyped-call]
    except BackendCompilerFailed as failure:
        if isinstance(failure.inner_exception, RingfxError):
            raise failure.inner_exception from failure.inner_exception.__cause__
        if not isinstance(failure.inner_exception, Planned):
            raise
    except (DataDependentOutputException, DynamicOutputShapeException) as unknown:
        return (
            *notes,
            "planning stopped where the model's Python code reads tensor values "
            f"({unknown.func}); the plan does not contain the code after that",
        )
    except TorchDynamoException as failure:
        _refuse_untraceable(mode, fake_model, fake_args, fake_kwargs, failure)
        raise
    finally:
        if not ISOLATED:
            torch.compiler.reset()
    return tuple(notes)


def _refuse_untraceable(
    mode: FakeTensorMode, model: torch.nn.Module, args: Any, kwargs: Any, failure: Exception
) -> None:
    """Says so where Dynamo fails on the model without ringfx too.

    Raises
    ------
    CaptureRefused
        With Dynamo's reason.
    """
    plain = torch.compile(model, backend=lambda gm, inputs: gm.forward, dynamic=False, **ISOLATED)
    try:
        with mode:
            plain(*args, **kwargs)  # type: ignore[no-untyped-call]
    except TorchDynamoException as alone:
        lines = [line for line in str(alone).strip().splitlines() if line.strip()]
        reason = lines[0] if lines else type(alone).__name__
        where = next((x.strip() for x in reversed(lines) if x.strip().startswith("File ")), "")
        raise CaptureRefused(
            f"torch.compile cannot trace this model, with or without ringfx: {reason}"
            + (f" ({where})" if where else "")
            + (
                ". Do: make torch.compile(model, backend='eager') work first; Dynamo's full "
                "report is attached as the cause of this error."
            )
        ) from failure
    except Exception:  # of the model's own code: what failed first is said
        return


def _trained(model: torch.nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The parameters that a call gives gradients to, by the graph of a run on fake tensors.

    Where that run cannot be made, none: tracing then says what there is to say.
    """
    model = model._ringfx_inner if isinstance(model, Optimized) else model
    leaves = tree_leaves((args, kwargs))
    if not all(x is None or isinstance(x, torch.Tensor | int | float | str) for x in leaves):
        return []  # an object, such as a cache, that the run would change
    mode = _mode_of(model, args, kwargs)
    fake_model, fake_args, fake_kwargs = _as_fake(mode, model, args, kwargs)
    try:
        with mode:
            results = fake_model(*fake_args, **fake_kwargs)
    except Exception:  # of the model's own code, or a value that it reads
        return []
    own = {id(x) for x in fake_model.parameters()}
    return [x for x in leaves_of_graph(results) if id(x) in own]


def _tensors(model: torch.nn.Module, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    leaves = tree_leaves((args, kwargs))
    yield from (x for x in leaves if isinstance(x, torch.Tensor))


def _mode_of(model: torch.nn.Module, args: Any, kwargs: Any) -> FakeTensorMode:
    for tensor in _tensors(model, args, kwargs):
        if isinstance(tensor, FakeTensor):
            mode: FakeTensorMode = tensor.fake_mode
            return mode
    return GivenMode()


def _as_fake(mode: FakeTensorMode, model: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    """Model and inputs in one fake mode; ``meta`` tensors become fake CPU ones.

    Values that are there are kept beside the fake tensors, for what reads them.
    """

    def fake(x: Any, name: str) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
            return x
        if x.device.type != "meta":
            twin = as_fake(mode, x)
            if isinstance(mode, GivenMode):
                mode.give(twin, x)
            return twin
        with mode:
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
        if isinstance(mode, GivenMode):
            mode.assume(made, name)
        return made

    memo: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        twin = fake(tensor, f"the model's {name}")
        if type(tensor) is torch.Tensor and tensor.device.type != "meta":
            keep_value(twin, tensor)
        if isinstance(tensor, torch.nn.Parameter) and not isinstance(twin, torch.nn.Parameter):
            twin = torch.nn.Parameter(twin, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = twin
    twin_model = copy.deepcopy(model, memo)

    names = [*inspect.signature(model.forward).parameters]

    def named(path: Any, x: Any) -> Any:
        place = getattr(path[1], "idx", None)
        if place is not None and path[0].idx == 0 and place < len(names):
            return fake(x, names[place])
        return fake(x, keystr(path[1:]))

    return twin_model, *tree_map_with_path(named, (args, kwargs))


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Build models and inputs of any size here: their tensors have shapes and no storage."""
    with torch.device("meta"):
        yield
