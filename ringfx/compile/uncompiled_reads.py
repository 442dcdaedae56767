"""Sharded parameters that code outside the compiled programs reads: gathered as they are read.

After a graph break Python runs a part of the model itself. What it finds in the place of a
parameter has no memory (``ringfx.compile.states``), so a module's attribute gives it the gathered
value. Programs take parameters from the module's dict, and gather by themselves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ringfx.comm.process_group import Ranks
from ringfx.comm.rendezvous import meet
from ringfx.comm.state_buckets import gather_state, rows_of_a_part
from ringfx.comm.state_ranks import StateRanks
from ringfx.comm.world import World
from ringfx.compile.states import part_of_state
from ringfx.errors import CaptureRefused
from ringfx.ir.values import CommKind
from ringfx.split_tensor.handoff import ProgramHandoff
from ringfx.split_tensor.sharded_states import NAME_OF, STATE_OF
from ringfx.torch_compat.autograd import version_of
from ringfx.torch_compat.dynamo import not_started
from ringfx.torch_compat.dynamo_marks import not_traced
from ringfx.torch_compat.fake_tensors import TracingContext

__all__ = ["gathered_on_read"]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Reads:
    """What one call of a model has read."""

    states: StateRanks
    world: World
    handoff: ProgramHandoff
    made: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    """By name: the gathered value, kept until the call ends, and its version when it was made."""


_READS: ContextVar[_Reads | None] = ContextVar("reads of sharded parameters", default=None)


@contextlib.contextmanager
def gathered_on_read(states: StateRanks, world: World, handoff: ProgramHandoff) -> Iterator[None]:
    """Inside, ``module.weight`` in uncompiled code is the complete parameter.

    All ranks read together; each gradient goes to the rows' owners. It is noted in the plan and
    announced, with its bytes.

    Raises
    ------
    CaptureRefused
        At the end: the code has written what it read, and rows would not see that.
    """
    _watch_attributes()
    reads = _Reads(states=states, world=world, handoff=handoff)
    token = _READS.set(reads)
    try:
        yield
    finally:
        _READS.reset(token)
    for name in reads.made:
        _refuse_written(name, reads)


def _refuse_written(name: str, reads: _Reads) -> None:
    value, version = reads.made[name]
    if _version(value) != version:
        raise CaptureRefused(
            f"{name} {[*value.shape]} is written by code that is not compiled, and this rank "
            "holds only its rows (shard_states). Do: write it outside the model's call, or call "
            "ringfx.optimize without shard_states."
        )


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else version_of(value)


@functools.cache
def _watch_attributes() -> None:
    """Once in a process: outside ``gathered_on_read`` attributes are what they were."""
    usual = nn.Module.__getattr__

    def attribute(self: nn.Module, name: str) -> Any:
        value = usual(self, name)
        if torch.compiler.is_compiling():  # Dynamo writes this function into the program
            return value
        return _as_read(value) if isinstance(value, nn.Parameter) else value

    not_started(attribute.__code__)
    nn.Module.__getattr__ = functools.update_wrapper(attribute, usual)  # type: ignore[method-assign]


@not_traced
def _as_read(parameter: nn.Parameter) -> Tensor:
    reads = _READS.get()
    if reads is None or not hasattr(parameter, STATE_OF) or TracingContext.try_get() is not None:
        return parameter
    name = getattr(parameter, NAME_OF)
    if name in reads.made:
        _refuse_written(name, reads)
        known, _ = reads.made[name]
        if known.requires_grad or not (torch.is_grad_enabled() and parameter.requires_grad):
            return known
    return _gathered(parameter, name, reads)


def _gathered(stand_in: nn.Parameter, name: str, reads: _Reads) -> Tensor:
    states = reads.states
    meet(Ranks.named(reads.world.group, name), f"a use of {name} outside the compiled programs")
    rows = stand_in.shape[0]
    mine = part_of_state(stand_in, rows_of_a_part(rows, states.ranks))
    whole = gather_state(mine, rows, states.as_argument(), name)
    reads.handoff.note(name, whole.nbytes, CommKind.ALL_GATHER_STATES)
    reads.made[name] = whole, _version(whole)
    return whole
