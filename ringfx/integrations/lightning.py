"""Lightning's Trainer where ranks share a sequence: a strategy."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from ringfx.api import optimize
from ringfx.compile.optimized import Optimized, around
from ringfx.data.groups import SequenceGroups
from ringfx.errors import InvalidArgument

__all__ = ["SequenceParallelStrategy"]


class SequenceParallelStrategy(DDPStrategy):  # type: ignore[misc]
    """Ranks that share a sequence get the same batches and split what the module calls.

    ::

        strategy = ringfx.integrations.lightning.SequenceParallelStrategy()
        Trainer(strategy=strategy, devices=4, ...).fit(module, loader)

    It trains as one process does; with ``sequence_ranks=2``, of four, as ``"ddp"`` on two. The
    module is given to ``ringfx.optimize`` unless a part of it was: models that ``training_step``
    calls are split then.

    Parameters
    ----------
    sequence_ranks
        So many consecutive ranks share a sequence; None: all do.
    ddp
        Options of ``DDPStrategy`` and, over the groups, of ``DistributedDataParallel``.
    options
        Of ``ringfx.optimize``.

    Raises
    ------
    InvalidArgument
        At once for options that do not go with it; at the start of the trainer if the ranks cannot
        be parted so.
    """

    _lightning_module: LightningModule | None

    def __init__(
        self,
        *,
        sequence_ranks: int | None = None,
        ddp: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        _refuse(options)
        given, own = dict(ddp or {}), inspect.signature(DDPStrategy).parameters
        super().__init__(**given)
        self._ringfx_ddp = {name: x for name, x in given.items() if name not in own}
        self._ringfx_sequence_ranks = sequence_ranks
        self._ringfx_options = options
        self._ringfx_groups = SequenceGroups()
        self._ringfx_split: LightningModule | None = None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {
            "num_replicas": self._ringfx_groups.data_size, "rank": self._ringfx_groups.data_rank,
        }  # fmt: skip

    def setup_environment(self) -> None:
        super().setup_environment()
        self._ringfx_groups = SequenceGroups.of(
            None, self._ringfx_sequence_ranks, self.root_device.type
        )

    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None, "the trainer connects it first"
        _count_each_group_once(module, self._ringfx_groups.data)
        if not any(isinstance(part, Optimized) for part in module.modules()):
            split = optimize(module, mesh=self._ringfx_groups.sequence, **self._ringfx_options)
            self.model = self._ringfx_split = around(module, split)
        super().setup(trainer)

    def configure_ddp(self) -> None:
        if self._ringfx_groups.data is not None:
            super().configure_ddp()

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Over the groups, and around the module as it was given: a step is no call to split."""
        return DistributedDataParallel(
            self.lightning_module, device_ids=self.determine_ddp_device_ids(),
            process_group=self._ringfx_groups.data, **self._ringfx_ddp,
        )  # fmt: skip

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._split_module():
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._split_module():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._split_module():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._split_module():
            return super().predict_step(*args, **kwargs)

    @contextlib.contextmanager
    def _split_module(self) -> Iterator[None]:
        """A step is a method of the split module: what it calls of its parts is split."""
        given = self._lightning_module
        self._lightning_module = self._ringfx_split or given
        try:
            yield
        finally:
            self._lightning_module = given

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        group = group or self._ringfx_groups.data
        return tensor if group is None else super().reduce(tensor, group, reduce_op)

    def all_gather(
        self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False
    ) -> torch.Tensor:
        group = group or self._ringfx_groups.data
        if group is None:
            return tensor
        found: torch.Tensor = super().all_gather(tensor, group, sync_grads)
        return found

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Of all ranks, not of groups."""
        found = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(found, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(found)


def _refuse(options: Mapping[str, Any]) -> None:
    if "mesh" in options:
        raise InvalidArgument(
            "mesh: Lightning makes the process group when it starts, after any mesh. Do: pass "
            "sequence_ranks=N."
        )
    if options.get("shard_states", False) is not False:
        raise InvalidArgument(
            "shard_states does not go with Lightning's checkpoints, which each rank reads whole. "
            "Do: leave it out; with sharded states use a loop of your own, or transformers' "
            "Trainer."
        )


def _count_each_group_once(module: nn.Module, data: dist.ProcessGroup | None) -> None:
    """torchmetrics sums states over all ranks, where those of a sequence hold the same."""
    for part in module.modules():
        if isinstance(part, Metric):
            part.process_group = data
            if data is None:
                part.distributed_available_fn = _never


def _never() -> bool:
    return False
