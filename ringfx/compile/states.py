"""States sharded over the sequence's ranks: parameters as DTensors of which a rank has rows.

The model holds DTensors: so optimizers, clipping, checkpoints and ``state_dict`` work as they do
with FSDP2. While it runs, a stand-in is in the place of each: a plain parameter of its global
shape and without memory. That is what Dynamo traces. The program takes this rank's rows in its
place, and gathers.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ringfx.comm.state_buckets import rows_of_a_part
from ringfx.comm.world import World, process_group
from ringfx.errors import InvalidArgument

__all__ = ["StandIns", "example_of_part", "has_rows", "part_of_state", "shard_states"]

_STATE = "_ringfx_state"
"""Attribute of a stand-in: the sharded parameter."""
NAMED = 4
"""Parameters that an error names."""


def has_rows(parameter: torch.Tensor) -> bool:
    """Whether it is cut by its first dimension; a number stays whole on every rank."""
    return parameter.dim() > 0 and parameter.is_floating_point()


def shard_states(model: nn.Module, world: World, mesh: Any) -> None:
    """Put DTensors in the place of the model's parameters; no rank keeps more than its rows.

    Raises
    ------
    InvalidArgument
        A parameter is a DTensor that is cut in another way, or an optimizer holds one already.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidArgument(
            "shard_states=True needs the ranks to share the states, but torch.distributed is not "
            "initialised. Do: call torch.distributed.init_process_group() before ringfx.optimize."
        )
    if world.size == 1:
        return
    parameters = dict(model.named_parameters())
    _refuse_other_dtensors(parameters, world)
    _refuse_made_optimizers(parameters)
    devices = [p.device.type for p in parameters.values() if p.device.type != "meta"]
    device = next(iter(devices), "cuda" if torch.cuda.is_available() else "cpu")
    ranks = mesh if isinstance(mesh, DeviceMesh) else _mesh_of(world, device)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not has_rows(parameter) or _is_sharded(parameter, world):
                continue
            if parameter not in made:
                made[parameter] = _sharded(parameter, world, ranks)
            module._parameters[name] = made[parameter]


def _mesh_of(world: World, device: str) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(process_group(world.group), device)


def _is_sharded(parameter: torch.Tensor, world: World) -> bool:
    """Whether it is a DTensor of which each of these ranks holds its rows."""
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim != 1:
        return False
    group: str = parameter.device_mesh.get_group().group_name
    return group == world.group and tuple(parameter.placements) == (Shard(0),)


def _refuse_other_dtensors(parameters: dict[str, nn.Parameter], world: World) -> None:
    from torch.distributed.tensor import DTensor

    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor) and not _is_sharded(parameter, world):
            raise InvalidArgument(
                f"shard_states: {name} {tuple(parameter.shape)} is a DTensor already, "
                f"{parameter.placements} on {parameter.device_mesh}. Do: call ringfx.optimize("
                "model, shard_states=True) instead of fully_shard and parallelize_module, or "
                "leave shard_states out."
            )


def _refuse_made_optimizers(parameters: dict[str, nn.Parameter]) -> None:
    """An optimizer that holds them would go on with parameters that are no longer the model's."""
    known = set(map(id, parameters.values()))
    for found in gc.get_objects():
        if not issubclass(type(found), torch.optim.Optimizer):
            continue
        held = {id(p) for group in found.param_groups for p in group["params"]}
        if names := [name for name, p in parameters.items() if id(p) in held & known]:
            raise InvalidArgument(
                f"shard_states: {type(found).__name__} holds {', '.join(names[:NAMED])}"
                f"{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''}, which "
                "sharding replaces. Do: make the optimizer after ringfx.optimize."
            )


def _sharded(parameter: nn.Parameter, world: World, mesh: Any) -> nn.Parameter:
    from torch.distributed.tensor import DTensor, Shard

    rows, given = rows_of_a_part(parameter.shape[0], world.size), parameter.detach()
    mine = given[world.rank * rows : (world.rank + 1) * rows]
    mine = mine.clone(memory_format=torch.contiguous_format)
    placed = DTensor.from_local(
        mine, mesh, [Shard(0)], run_check=False,
        shape=given.shape, stride=given.contiguous().stride(),
    )  # fmt: skip
    return nn.Parameter(placed, requires_grad=parameter.requires_grad)


class StandIns:
    """Parameters of the global shapes and without memory, for one model on one rank."""

    def __init__(self) -> None:
        self._made: weakref.WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = (
            weakref.WeakKeyDictionary()
        )

    @contextlib.contextmanager
    def in_place(self, model: nn.Module, world: World) -> Iterator[None]:
        """Inside, they stand where the model's sharded parameters are."""
        places = [
            (module, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and _is_sharded(parameter, world)
        ]
        tied: dict[nn.Parameter, nn.Parameter] = {}
        for module, name, parameter in places:
            if parameter not in tied:
                tied[parameter] = self._of(module, name, parameter)
            module._parameters[name] = tied[parameter]
        try:
            yield
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter

    def _of(self, module: nn.Module, name: str, state: nn.Parameter) -> nn.Parameter:
        made = self._made.setdefault(module, {})
        known = made.get(name)
        if known is None or (known.shape, known.dtype, known.device) != (
            state.shape, state.dtype, state.device,
        ):  # fmt: skip
            known = nn.Parameter(torch.empty(state.shape, dtype=state.dtype, device=state.device))
            known.untyped_storage().resize_(0)
            made[name] = known
        known.requires_grad_(state.requires_grad)
        setattr(known, _STATE, state)
        return known


def part_of_state(stand_in: Any, rows: int) -> torch.Tensor:
    """This rank's rows of the parameter, padded to as many as every rank has; differentiable."""
    mine: torch.Tensor = getattr(stand_in, _STATE).to_local()
    missing = rows - mine.shape[0]
    return F.pad(mine, (0, 0) * (mine.dim() - 1) + (0, missing)) if missing else mine


def example_of_part(whole: torch.Tensor, rows: int) -> torch.Tensor:
    """For compilation."""
    made = torch.empty((rows, *whole.shape[1:]), dtype=whole.dtype, device=whole.device)
    return made.requires_grad_(whole.requires_grad)
