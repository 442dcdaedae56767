"""transformers' Trainer, and those that are made of it (TRL's), where ranks share a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME

from ringfx.errors import InvalidArgument
from ringfx.integrations import accelerate
from ringfx.integrations.whole_states import WholeStates

__all__ = ["prepare"]

T = TypeVar("T", bound=Trainer)

_BY_THE_TRAINER = (
    "let the Trainer make it: in place of optimizers=, pass optimizer_cls_and_kwargs=("
    "torch.optim.SGD, {'lr': 0.1}), or what yours is"
)


def prepare(
    trainer: T,
    *,
    mesh: DeviceMesh | None = None,
    sequence_ranks: int | None = None,
    **options: Any,
) -> T:
    """The same trainer, whose model is split and whose sequence groups get one batch each.

    ::

        trainer = ringfx.integrations.transformers.prepare(Trainer(model, args, ...))
        trainer.train()

    Under ``torchrun --nproc-per-node 4`` it trains as ``Trainer`` on one process does: the same
    batches, steps, losses and saved model. With ``sequence_ranks=2`` it trains as on two.

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
        It is no trainer, it has trained before, or it splits or shards by itself.
    """
    if not isinstance(trainer, Trainer):
        raise InvalidArgument(
            f"trainer must be a transformers.Trainer, not {type(trainer).__name__}. Do: make the "
            "Trainer, then call prepare(trainer) before trainer.train()."
        )
    if trainer.args.n_gpu > 1:
        raise InvalidArgument(
            f"the trainer runs {trainer.args.n_gpu} GPUs from one process (DataParallel). Do: "
            "start one process for each GPU: torchrun --nproc-per-node N script.py."
        )
    if trainer.model_wrapped is not trainer.model:
        raise InvalidArgument(
            "the trainer's model is already wrapped: it has trained before. Do: call prepare right "
            "after the trainer is made."
        )
    changed = cast(Any, trainer)
    accelerator = accelerate.prepare(
        trainer.accelerator, mesh=mesh, sequence_ranks=sequence_ranks, **options
    )
    cast(Any, accelerator)._ringfx_holds_back = True  # the trainer clips once for all of them
    model = accelerate.split_model(accelerator, trainer.model, _BY_THE_TRAINER)
    changed.model = changed.model_wrapped = changed.callback_handler.model = model
    changed.gather_function = accelerator.gather_for_metrics
    given = type(trainer)
    changed.__class__ = type(
        f"{given.__name__}OverSequenceGroups", (_OverSequenceGroups, given), {}
    )
    return trainer


class _OverSequenceGroups(Trainer):
    """A trainer whose processes, as far as data is concerned, are groups of ranks."""

    def get_total_train_batch_size(self, args: Any) -> int:
        of_all_ranks: int = super().get_total_train_batch_size(args)
        return of_all_ranks // int(args.world_size) * int(self.accelerator.num_processes)

    def call_model_init(self, trial: Any = None) -> Any:
        """What ``model_init`` makes for each training is trained, evaluated and saved split."""
        return accelerate.split_model(self.accelerator, super().call_model_init(trial))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Of sharded states, whole ones: the checkpoint is that of any Trainer."""
        if self._ringfx_shares_states and state_dict is None:
            state_dict = WholeStates(self.model).state_dict()
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._ringfx_shares_states:
            state = WholeStates(self.optimizer).state_dict()
            if self.args.should_save:
                torch.save(state, Path(output_dir, OPTIMIZER_NAME))

    @property
    def _ringfx_shares_states(self) -> bool:
        return accelerate.shares_states(self.model)
