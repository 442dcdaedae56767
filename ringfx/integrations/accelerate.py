"""accelerate where ranks share a sequence: same batch, one mean, no copies in what is gathered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import PartialState
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from ringfx.api import optimize
from ringfx.compile.optimized import Optimized
from ringfx.compile.states import held_by_an_optimizer
from ringfx.data.groups import SequenceGroups
from ringfx.errors import InvalidArgument
from ringfx.integrations.streamed import PartsOfBatches, SizeOfLastBatch
from ringfx.integrations.whole_states import WholeStates
from ringfx.split_tensor.tensor import SplitTensor
from ringfx.units.argument import Argument

__all__ = ["prepare", "shares_states", "split_model"]

A = TypeVar("A", bound=Accelerator)


def prepare(
    accelerator: A,
    *,
    mesh: DeviceMesh | None = None,
    sequence_ranks: int | None = None,
    **options: Any,
) -> A:
    """The same accelerator, whose ``prepare`` splits models and gives sequence groups one batch.

    ::

        accelerator = ringfx.integrations.accelerate.prepare(Accelerator())
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    Models are given to ``ringfx.optimize`` unless they come from it. ``DistributedDataParallel`` is
    over the groups, where there are several. ``gather``, ``gather_for_metrics`` and ``reduce`` take
    one copy of each group's values; ``num_processes`` is the number of groups.

    Parameters
    ----------
    mesh
        All ranks: of one dimension, which is the sequence's, or data, then sequence.
    sequence_ranks
        Instead of a mesh: so many consecutive ranks share a sequence; None: all ranks do.
    options
        Of ``ringfx.optimize``.

    Raises
    ------
    InvalidArgument
        The ranks cannot be parted so, or the accelerator splits or shards by itself.
    """
    if not isinstance(accelerator, Accelerator):
        raise InvalidArgument(
            f"accelerator must be an accelerate.Accelerator, not {type(accelerator).__name__}. Do: "
            "call prepare(accelerate.Accelerator())."
        )
    if isinstance(accelerator, _OverSequenceGroups):
        raise InvalidArgument(
            "this accelerator is already prepared. Do: call ringfx.integrations.accelerate.prepare "
            "once."
        )
    _refuse_other_ways(accelerator)
    if accelerator.dataloader_config.dispatch_batches:
        raise InvalidArgument(
            "dispatch_batches=True sends each rank its own part of a batch, but ranks that share a "
            "sequence need the same one. Do: leave it out; every rank loads its group's batch."
        )
    if accelerator.dataloader_config.use_stateful_dataloader:
        raise InvalidArgument(
            "use_stateful_dataloader=True counts what loaders have given by the ranks, and ranks "
            "that share a sequence are given the same. Do: leave it out, and resume with "
            "accelerator.skip_first_batches(loader, batches)."
        )
    groups = SequenceGroups.of(mesh, sequence_ranks, accelerator.device.type)
    sends = accelerator.dataloader_config.dispatch_batches is None
    accelerator.dataloader_config.dispatch_batches = False
    given = type(accelerator)
    name = f"{given.__name__}OverSequenceGroups"
    split = cast(Any, accelerator)
    split.__class__ = type(name, (_OverSequenceGroups, given), {})
    split._ringfx_groups = groups
    split._ringfx_options = options
    split._ringfx_loads = split._ringfx_parted = split._ringfx_holds_back = False
    split._ringfx_would_send = sends and not accelerator.split_batches
    return accelerator


_MODEL_FIRST = (
    "call model = accelerator.prepare(model) first, then make the optimizer of model.parameters() "
    "and call accelerator.prepare(optimizer)"
)


def split_model(accelerator: Accelerator, model: Any, optimizer_later: str = _MODEL_FIRST) -> Any:
    """By a prepared accelerator's options; a model that was split before stays as it is.

    States are shared by all ranks, those of other groups too.

    Raises
    ------
    InvalidArgument
        An optimizer holds parameters that would be sharded; ``optimizer_later`` is what to do.
    """
    if isinstance(model, Optimized):
        return model
    split = cast(_OverSequenceGroups, accelerator)
    options, groups = dict(split._ringfx_options), split._ringfx_groups
    shares = bool(options.get("shard_states")) and accelerator.state.num_processes > 1
    if shares and (held := held_by_an_optimizer(model)):
        raise InvalidArgument(f"{held}. Do: make the optimizer after that: {optimizer_later}.")
    if options.get("shard_states") is True and groups.every is not None:
        options["shard_states"] = groups.every
    return optimize(model, mesh=groups.sequence, **options)


def shares_states(model: Any) -> bool:
    """Whether its parameters are sharded."""
    return isinstance(model, Optimized) and model._ringfx_shared.states.ranks > 1


def _refuse_other_ways(accelerator: Accelerator) -> None:
    """What would split or shard the model, or its inputs, a second time."""
    config = getattr(accelerator, "parallelism_config", None)
    sizes = {name: getattr(config, name, 1) for name in ("cp_size", "sp_size", "tp_size")}
    if taken := [f"{name}={size}" for name, size in sizes.items() if (size or 1) > 1]:
        raise InvalidArgument(
            f"the accelerator has {taken[0]}, which splits sequences (or layers) its own way. Do: "
            "make the Accelerator without it, and say how many ranks share a sequence with "
            "prepare(accelerator, sequence_ranks=N)."
        )
    state = accelerator.state
    for plugin in ("deepspeed_plugin", "fsdp_plugin"):
        if getattr(state, plugin, None) is not None:
            raise InvalidArgument(
                f"the accelerator has a {plugin}, which shards states by itself. Do: make it "
                f"without, and pass {Argument('shard_states', True)} to prepare, which divides "
                "them by the ranks."
            )


class _OverSequenceGroups(Accelerator):  # type: ignore[misc]
    """An accelerator whose processes, as far as data is concerned, are groups of ranks."""

    _ringfx_groups: SequenceGroups
    _ringfx_options: dict[str, Any]
    _ringfx_loads: bool
    _ringfx_parted: bool
    """Whether the loader that is prepared gives this group's part already."""
    _ringfx_would_send: bool
    """Whether accelerate by itself would send parts of a stream's batches."""
    _ringfx_holds_back: bool
    """Whether gradients are summed over a sequence's ranks once for all calls that accumulate. Who
    clips in between would clip parts of them."""

    @property
    def num_processes(self) -> int:
        return 1 if self._ringfx_parted else self._ringfx_groups.data_size

    @property
    def process_index(self) -> int:
        return self._ringfx_groups.data_rank if self._ringfx_loads else self.state.process_index

    def prepare_data_loader(self, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        groups = self._ringfx_groups
        parted = self._ringfx_would_send and groups.data is not None and _streams(data_loader)
        if parted:
            data_loader = PartsOfBatches(data_loader, groups.data_size, groups.data_rank).loader()
        with self._as_group(parted):
            loader = super().prepare_data_loader(data_loader, *args, **kwargs)
        if (groups.data is None or parted) and type(loader) is DataLoaderShard:
            loader = self._dataloaders[-1] = SizeOfLastBatch.like(loader)
        return loader

    def prepare_scheduler(self, scheduler: Any) -> Any:
        prepared = super().prepare_scheduler(scheduler)
        if type(prepared) is AcceleratedScheduler:
            prepared.__class__ = _SchedulerOverGroups
            prepared._ringfx_groups = self.num_processes
        return prepared

    @contextlib.contextmanager
    def _as_group(self, parted: bool) -> Iterator[None]:
        self._ringfx_loads, self._ringfx_parted = True, parted
        try:
            yield
        finally:
            self._ringfx_loads = self._ringfx_parted = False

    def prepare_model(
        self,
        model: nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
    ) -> Any:
        data = self._ringfx_groups.data
        split = split_model(self, model)
        prepared = super().prepare_model(split, device_placement, evaluation_mode=True)
        trains = any(p.requires_grad for p in prepared.parameters())
        shares = shares_states(split)
        if evaluation_mode or data is None or not trains or shares:
            return prepared
        handler = self.ddp_handler
        where = None if self.device.type == "cpu" else [self.device.index]
        parallel = DistributedDataParallel(
            prepared, device_ids=where, process_group=data,
            **({} if handler is None else handler.to_kwargs()),
        )  # fmt: skip
        if handler is not None:
            handler.register_comm_hook(parallel)
        return parallel

    def get_state_dict(self, model: Any, unwrap: bool = True) -> Any:
        """Whole, where states are sharded: all ranks call it."""
        if shares_states(self.unwrap_model(model)):
            return WholeStates(model).state_dict()
        return super().get_state_dict(model, unwrap)

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        with self._whole_states("_optimizers"):
            return super().save_state(*args, **kwargs)

    def load_state(self, *args: Any, **kwargs: Any) -> Any:
        with self._whole_states("_models"):
            return super().load_state(*args, **kwargs)

    @contextlib.contextmanager
    def _whole_states(self, *lists: str) -> Iterator[None]:
        given = {name: getattr(self, name) for name in lists}
        if any(shares_states(model) for model in self._models):
            for name, parts in given.items():
                setattr(self, name, [WholeStates(part) for part in parts])
        try:
            yield
        finally:
            for name, parts in given.items():
                setattr(self, name, parts)

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        with (
            super().no_sync(model)
            if self._ringfx_holds_back or self._ringfx_groups.data is not None
            else contextlib.nullcontext()
        ):
            yield

    def gather(self, tensor: Any) -> Any:
        return self._over_groups(tensor, _gathered)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        size = self.num_processes

        def reduced(value: Tensor, group: dist.ProcessGroup) -> Tensor:
            total = value.clone()
            dist.all_reduce(total, group=group)
            return total

        found = self._over_groups(tensor, reduced)
        factor = scale / (size if reduction == "mean" else 1)
        if factor == 1 or reduction == "none":
            return found
        return recursively_apply(lambda value: value * factor, found)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        groups = self._ringfx_groups
        if not use_gather_object and _holds_tensors(input_data):
            return super().gather_for_metrics(input_data)
        if groups.data is None:
            return input_data
        parts: list[Any] = [None] * groups.data_size
        dist.all_gather_object(parts, input_data, group=groups.data)
        found = [x for part in parts for x in part]
        ends, rest = self.gradient_state.end_of_dataloader, self.gradient_state.remainder
        return found[:rest] if ends and rest > 0 else found

    def _over_groups(
        self, values: Any, collective: Callable[[Tensor, dist.ProcessGroup], Tensor]
    ) -> Any:
        data = self._ringfx_groups.data

        def of(value: Tensor) -> Tensor:
            whole = value.whole() if isinstance(value, SplitTensor) else value
            return whole if data is None else collective(whole.detach().contiguous(), data)

        return recursively_apply(of, values, error_on_other_type=True)


class _SchedulerOverGroups(AcceleratedScheduler):  # type: ignore[misc]
    """Steps once for each batch of a step, of which there are as many as groups: not as ranks."""

    _ringfx_groups: int

    def step(self, *args: Any, **kwargs: Any) -> None:
        state = PartialState()  # AcceleratorState copies it whenever it is asked
        ranks, state.num_processes = state.num_processes, self._ringfx_groups
        try:
            super().step(*args, **kwargs)
        finally:
            state.num_processes = ranks


def _streams(loader: Any) -> bool:
    is_prepared = getattr(loader, "_is_accelerate_prepared", False)
    return isinstance(loader.dataset, IterableDataset) and not is_prepared


def _gathered(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Of all groups, along the first dimension."""
    value = torch.atleast_1d(value)
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value, group=group)
    return torch.cat(parts)


def _holds_tensors(data: Any) -> bool:
    try:
        recursively_apply(lambda value: value, data, error_on_other_type=True)
    except TypeError:
        return False
    return True
