"""States sharded over the sequence's ranks: parameters as DTensors of which a rank has rows.

The model holds DTensors: so optimizers, clipping, checkpoints and ``state_dict`` work as they do
with FSDP2. While it runs, a stand-in is in the place of each: a plain parameter of its global
shape and without memory. That is what Dynamo traces. The program takes this rank's rows in its
place, and gathers.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ringfx.comm.state_buckets import rows_of_a_part
from ringfx.comm.state_ranks import ONE_RANK, StateRanks
from ringfx.comm.world import World, process_group
from ringfx.compile.optimizer_rows import let_optimizers_load_whole_states, rows_like
from ringfx.compile.optimizer_steps import note_steps
from ringfx.compile.untouched_memory import UntouchedMemory
from ringfx.errors import CaptureRefused, InvalidArgument
from ringfx.split_tensor.sharded_states import NAME_OF, STATE_OF, read_uncompiled
from ringfx.torch_compat.distributed import flattened
from ringfx.torch_compat.pytree import tree_map
from ringfx.units.argument import Argument, Code

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = [
    "StandIns", "cast_inputs", "example_of_part", "has_rows", "held_by_an_optimizer",
    "in_param_dtype", "in_rows", "part_of_state", "planned_states", "shard_states",
]  # fmt: skip

_MEMORY_OF = "_ringfx_memory"
"""Attribute of a stand-in on the CPU: its ``UntouchedMemory``."""
NAMED = 4
"""Parameters that an error names."""


def has_rows(parameter: torch.Tensor) -> bool:
    """Whether it is cut by its first dimension; a number stays whole on every rank."""
    return parameter.dim() > 0 and parameter.is_floating_point()


def shard_states(
    model: nn.Module, world: World, mesh: Any, policy: MixedPrecisionPolicy | None
) -> StateRanks:
    """Put DTensors in the place of the model's parameters; no rank keeps more than its rows.

    ``mesh``: True for the ranks of the sequence, or a mesh or group that contains them.

    Raises
    ------
    InvalidArgument
        A parameter is a DTensor that is cut in another way, an optimizer holds one already, or the
        mesh does not contain the sequence's ranks.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidArgument(
            "shard_states needs the ranks to share the states, but torch.distributed is not "
            "initialised. Do: call torch.distributed.init_process_group() before ringfx.optimize."
        )
    if not isinstance(mesh, bool | DeviceMesh | dist.ProcessGroup):
        raise InvalidArgument(
            f"{Argument('shard_states', mesh)}: a number of ranks is for ringfx.plan, which has "
            "none. Do: pass True, or the DeviceMesh of these ranks."
        )
    mesh = flattened(mesh) if isinstance(mesh, DeviceMesh) else mesh
    over = world if mesh is True else World.of(mesh)
    if over.size == 1:
        return ONE_RANK
    _refuse_other_ranks(over, world)
    parameters = dict(model.named_parameters())
    _refuse_fully_sharded(model)
    _refuse_other_dtensors(parameters, over)
    _refuse_made_optimizers(model)
    ranks = with_dtypes(sharded_over(over, world), parameters, policy)
    _refuse_numbers(parameters, ranks)
    devices = [p.device.type for p in parameters.values() if p.device.type != "meta"]
    device = next(iter(devices), "cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(mesh, DeviceMesh):
        mesh = DeviceMesh.from_group(process_group(over.group), device)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not has_rows(parameter) or _is_sharded(parameter, over.group):
                continue
            if parameter not in made:
                made[parameter] = _sharded(parameter, over, mesh)
            module._parameters[name] = made[parameter]
    let_optimizers_load_whole_states()
    note_steps()
    return ranks


def planned_states(
    asked: bool | int,
    world: World,
    parameters: Mapping[str, torch.Tensor],
    policy: MixedPrecisionPolicy | None,
) -> StateRanks:
    """For a plan that is made offline; a number says how many ranks share the states.

    Raises
    ------
    InvalidArgument
        It is no multiple of the sequence's ranks.
    """
    if not isinstance(asked, int):
        raise InvalidArgument(
            f"{Argument('shard_states', asked)}: a plan is made without ranks. Do: pass True, or "
            "how many ranks share the states."
        )
    if asked is False:
        return ONE_RANK
    size = world.size if asked is True else asked
    if size < 1 or size % world.size:
        raise InvalidArgument(
            f"{Argument('shard_states', size)} is no multiple of "
            f"{Argument('world_size', world.size)}, the ranks of a sequence. Do: pass the "
            "sequence's ranks times the data parallel ones, such as "
            f"{Argument('shard_states', 2 * world.size)}."
        )
    if size > world.size == 1:
        raise _of_one_rank(size)
    over = sharded_over(World(size, 0, world.group), world)
    return with_dtypes(over, parameters, policy)


def sharded_over(over: World, world: World) -> StateRanks:
    """States over those ranks, with the sequence over ``world``."""
    return StateRanks(
        ranks=over.size, rank=over.rank, group=over.group, replicas=over.size // world.size
    )


def with_dtypes(
    ranks: StateRanks, parameters: Mapping[str, torch.Tensor], policy: MixedPrecisionPolicy | None
) -> StateRanks:
    """With the types that rows are kept, and that parameters and gradients are sent in.

    Raises
    ------
    InvalidArgument
        With a policy, parameters of several types.
    """
    if policy is None:
        return ranks
    of: dict[torch.dtype, str] = {}
    for name, parameter in parameters.items():
        if has_rows(parameter):
            of.setdefault(parameter.dtype, name)
    if len(of) > 1:
        listed = ", ".join(f"{name} of {dtype}" for dtype, name in of.items())
        raise InvalidArgument(
            f"{Argument('mp_policy')}: parameters are of several types ({listed}), and rows are "
            "kept in one. Do: convert the model to one type first, model.float()."
        )
    return replace(
        ranks, dtype=next(iter(of), None), param_dtype=policy.param_dtype,
        reduce_dtype=policy.reduce_dtype,
    )  # fmt: skip


def _refuse_numbers(parameters: Mapping[str, nn.Parameter], ranks: StateRanks) -> None:
    """What is not cut has a gradient of the sequence's ranks alone."""
    numbers = [n for n, p in parameters.items() if p.requires_grad and not has_rows(p)]
    if numbers and ranks.replicas > 1:
        raise InvalidArgument(
            f"{Argument('shard_states')}: {', '.join(numbers[:NAMED])} has no dimension to be cut "
            "by, and its gradient would not be averaged over the data parallel ranks. Do: give it "
            "one, nn.Parameter(value.reshape(1)), as fully_shard asks too."
        )


_BOTH, _ONE = 'mesh["dp_shard", "cp"]', 'mesh["cp"]'


def _of_one_rank(ranks: int) -> InvalidArgument:
    return InvalidArgument(
        f"{Argument('shard_states')}: the sequence is on one rank, and states would be over "
        f"{ranks}, which are data parallel alone. Do: use torch.distributed.fsdp.fully_shard, or "
        "split the sequence over several ranks."
    )


def _refuse_other_ranks(over: World, world: World) -> None:
    if world.size == 1:
        raise _of_one_rank(over.size)
    mine, all_of_them = (
        dist.get_process_group_ranks(process_group(w.group)) for w in (world, over)
    )
    if not set(mine) <= set(all_of_them):
        raise InvalidArgument(
            f"shard_states: the mesh that was given has ranks {all_of_them}, which do not contain "
            f"the sequence's, {mine}. Do: pass a mesh of both, such as "
            f"{Argument('shard_states', Code(_BOTH))} beside {Argument('mesh', Code(_ONE))}, or "
            f"{Argument('shard_states', True)}."
        )


def _refuse_fully_sharded(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise InvalidArgument(
                f"shard_states: {name or 'the model'} was given to fully_shard already, which "
                "shards and gathers its parameters. Do: leave out fully_shard, or shard_states."
            )


def _is_sharded(parameter: torch.Tensor, over: str) -> bool:
    """Whether it is a DTensor of which each rank of that group holds its rows."""
    from torch.distributed.tensor import Shard

    if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim != 1:
        return False
    group: str = parameter.device_mesh.get_group().group_name
    return group == over and tuple(parameter.placements) == (Shard(0),)


def _refuse_other_dtensors(parameters: dict[str, nn.Parameter], over: World) -> None:

    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor) and not _is_sharded(parameter, over.group):
            raise InvalidArgument(
                f"shard_states: {name} {tuple(parameter.shape)} is a DTensor already, "
                f"{parameter.placements} on {parameter.device_mesh}. Do: call ringfx.optimize("
                "model, shard_states=True) instead of fully_shard and parallelize_module, or "
                "leave shard_states out."
            )


def _refuse_made_optimizers(model: nn.Module) -> None:
    if held := held_by_an_optimizer(model):
        raise InvalidArgument(f"{held}. Do: make the optimizer after ringfx.optimize.")


def held_by_an_optimizer(model: nn.Module) -> str | None:
    """Which one would go on with parameters that are no longer the model's, in words."""
    parameters = dict(model.named_parameters())
    for found in gc.get_objects():
        if not issubclass(type(found), torch.optim.Optimizer):
            continue
        held = {id(p) for group in found.param_groups for p in group["params"]}
        if names := [name for name, p in parameters.items() if id(p) in held]:
            return (
                f"shard_states: {type(found).__name__} holds {', '.join(names[:NAMED])}"
                f"{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''}, which "
                "sharding replaces"
            )
    return None


def _sharded(parameter: nn.Parameter, over: World, mesh: Any) -> nn.Parameter:
    from torch.distributed.tensor import Shard

    rows, given = rows_of_a_part(parameter.shape[0], over.size), parameter.detach()
    mine = given[over.rank * rows : (over.rank + 1) * rows]
    mine = mine.clone(memory_format=torch.contiguous_format)
    placed = DTensor.from_local(
        mine, mesh, [Shard(0)], run_check=False,
        shape=given.shape, stride=given.contiguous().stride(),
    )  # fmt: skip
    return nn.Parameter(placed, requires_grad=parameter.requires_grad)


def in_rows(model: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's state, of which each rank has all, with this rank's rows of what is sharded."""
    own = dict(model.named_parameters(remove_duplicate=False))
    found: Any = copy.copy(state_dict)
    for name, value in state_dict.items():
        found[name] = rows_like(value, own.get(name))
    return cast(Mapping[str, Any], found)


class StandIns:
    """Parameters of the global shapes and without memory, for one model on one rank."""

    def __init__(self) -> None:
        self._made: weakref.WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = (
            weakref.WeakKeyDictionary()
        )

    @contextlib.contextmanager
    def in_place(self, model: nn.Module, ranks: StateRanks) -> Iterator[None]:
        """Inside, they stand where the model's sharded parameters are.

        Raises
        ------
        CaptureRefused
            At the end, also where the model fails of it: uncompiled code has read one.
        """
        places = [
            (path, module, name, parameter)
            for path, module in model.named_modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and _is_sharded(parameter, ranks.group)
        ]
        tied: dict[nn.Parameter, nn.Parameter] = {}
        for path, module, name, parameter in places:
            if parameter not in tied:
                dtype = ranks.param_dtype or parameter.dtype
                tied[parameter] = self._of(module, name, parameter, dtype)
                setattr(tied[parameter], NAME_OF, f"{path}.{name}".removeprefix("."))
            module._parameters[name] = tied[parameter]
        try:
            yield
        finally:
            for _, module, name, parameter in places:
                module._parameters[name] = parameter
            _refuse_touched(tied.values())

    def _of(
        self, module: nn.Module, name: str, state: nn.Parameter, dtype: torch.dtype
    ) -> nn.Parameter:
        made = self._made.setdefault(module, {})
        known = made.get(name)
        if known is None or (known.shape, known.dtype, known.device) != (
            state.shape, dtype, state.device,
        ):  # fmt: skip
            made[name] = known = _without_memory(state, dtype)
        known.requires_grad_(state.requires_grad)
        setattr(known, STATE_OF, state)
        return known


def _without_memory(state: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    if state.device.type == "cpu" and UntouchedMemory.is_told():
        # A system that does not overcommit may have no addresses left for whole parameters.
        with contextlib.suppress(OSError):
            memory = UntouchedMemory(state.shape, dtype)
            made = nn.Parameter(memory.tensor)
            setattr(made, _MEMORY_OF, memory)
            return made
    made = nn.Parameter(torch.empty(state.shape, dtype=dtype, device=state.device))
    made.untyped_storage().resize_(0)
    return made


def _refuse_touched(stand_ins: Iterable[nn.Parameter]) -> None:
    held = [(x, getattr(x, _MEMORY_OF)) for x in stand_ins if hasattr(x, _MEMORY_OF)]
    touched = [(x, memory) for x, memory in held if memory.was_touched()]
    for _, memory in touched:
        memory.forget()
    if touched:
        named = [f"{getattr(x, NAME_OF)} {[*x.shape]}" for x, _ in touched]
        raise CaptureRefused(read_uncompiled(", ".join(named[:NAMED])))


def in_param_dtype(model: nn.Module, states: StateRanks) -> None:
    """Let a model that is only traced have its parameters in the type that they are used in."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules() if states.param_dtype else ():
        for name, parameter in module._parameters.items():
            if parameter is not None and has_rows(parameter):
                if parameter not in made:
                    used = parameter.detach().to(states.param_dtype)
                    made[parameter] = nn.Parameter(used, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]


def cast_inputs(given: Any, states: StateRanks, policy: MixedPrecisionPolicy | None) -> Any:
    """Arguments of the model, floating-point tensors among them as its parameters are used."""
    if states.param_dtype is None or policy is None or not policy.cast_forward_inputs:
        return given
    return tree_map(
        lambda x: (
            x.to(states.param_dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        ),
        given,
    )


def part_of_state(stand_in: Any, rows: int) -> torch.Tensor:
    """This rank's rows of the parameter, padded to as many as every rank has; differentiable."""
    mine: torch.Tensor = getattr(stand_in, STATE_OF).to_local()
    missing = rows - mine.shape[0]
    return F.pad(mine, (0, 0) * (mine.dim() - 1) + (0, missing)) if missing else mine


def example_of_part(whole: torch.Tensor, rows: int, dtype: torch.dtype | None) -> torch.Tensor:
    """For compilation."""
    dtype = dtype or whole.dtype
    made = torch.empty((rows, *whole.shape[1:]), dtype=dtype, device=whole.device)
    return made.requires_grad_(whole.requires_grad)
