"""When nothing fits: what the peak is made of, and the nearest changes that would."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch

from ringfx.cost_model.choice.fits import longest
from ringfx.cost_model.choice.problem import Problem
from ringfx.cost_model.choice.remedies import remedies
from ringfx.cost_model.peak_memory.optimizers import state_bytes
from ringfx.errors import OutOfMemory, Shortfall
from ringfx.ir.memory_timeline import Peak, never_below, outside_peak, whole_bytes
from ringfx.units.argument import Argument
from ringfx.units.format import format_budget, format_bytes

__all__ = ["infeasible", "refuse_hopeless", "refuse_parameters"]


def refuse_parameters(
    parameters: Iterable[torch.Tensor],
    budget: int | None,
    optimizer: str | int = "none",
    world_size: int = 1,
    trained: Callable[[], Collection[torch.Tensor]] = tuple,
) -> None:
    """Before the model is traced: what each rank holds of its parameters is too much alone.

    Parameters
    ----------
    trained
        Finds the parameters that get gradients; asked only where that may decide.

    Raises
    ------
    OutOfMemory
        The parameters are, or they and their gradients and optimizer state.
    """
    if budget is None:
        return
    parameters = list(parameters)
    size = _bytes(parameters)
    if size > budget:
        raise _hopeless("parameters", size, budget, world_size)
    if size + _trained_bytes([x for x in parameters if x.requires_grad], optimizer) <= budget:
        return
    more = _trained_bytes(trained(), optimizer)
    if size + more > budget:
        state = "" if optimizer in ("none", 0) else " and optimizer state"
        raise _hopeless(f"parameters, gradients{state}", size + more, budget, world_size)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _trained_bytes(tensors: Collection[torch.Tensor], optimizer: str | int) -> int:
    """Their gradients, all of which are there when the backward ends, and optimizer state."""
    state = (state_bytes(optimizer, x.numel(), x.element_size()) for x in tensors)
    return _bytes(tensors) + sum(state)


def _hopeless(what: str, size: int, budget: int, world_size: int) -> OutOfMemory:
    ranks = max(world_size, -(-size // budget) + 1)
    where = "" if ranks == world_size else f" on {ranks:,} ranks or more"
    shard = (
        f"pass {Argument('shard_states', True)}{where}, which divides them by the ranks"
        f" ({format_bytes(size / ranks)} each)"
    )
    more = "give more memory, or use a smaller dtype"
    return OutOfMemory(
        f"no choice of strategies fits: {what} alone take {format_bytes(size)} on each rank, but "
        f"the budget is {_budget(budget)}.\n"
        f"  Do: {shard}; {more}. Without sharded states more ranks do not help.",
        Shortfall(needed=size, budget=budget, causes=((what, size),), remedies=(shard, more)),
    )


def refuse_hopeless(problem: Problem, *, advise: bool) -> None:
    """Before any strategy is looked at: what is there outside attention is too much alone.

    ``advise``: whether the error names what would fit.

    Raises
    ------
    OutOfMemory
        It is; nothing of what attention needs is counted then.
    """
    seq_len, world_size = longest(problem.sites), problem.world_size
    if problem.budget is None:
        return
    if never_below(problem.memory, world_size=world_size, seq_len=seq_len) > problem.budget:
        found = outside_peak(problem.memory, world_size=world_size, seq_len=seq_len)
        raise _infeasible(problem, found, "outside attention alone", advise=advise)


def infeasible(problem: Problem, *, advise: bool) -> OutOfMemory:
    """What is needed, what it is made of, and, to advise, the nearest changes that would fit."""
    fitting = problem.at(problem.world_size)
    return _infeasible(problem, fitting.peak(fitting.least), advise=advise)


def _infeasible(problem: Problem, found: Peak, what: str = "", *, advise: bool) -> OutOfMemory:
    assert problem.budget is not None
    largest = sorted(found.causes.items(), key=lambda part: -part[1])
    causes = tuple((name, size) for name, size in largest if size)
    made_of = ", ".join(f"{name} {format_bytes(size)}" for name, size in causes)
    changes = (tuple(remedies(problem)) or (_more_memory(problem),)) if advise else ()
    return OutOfMemory(
        f"no choice of strategies fits: {problem.world_size} ranks need at least"
        f" {format_bytes(found.bytes)} each{f' {what}' if what else ''},"
        f" the budget is {_budget(problem.budget)}.\n"
        f"  Made of: {made_of}.{_do(changes)}",
        Shortfall(
            needed=round(found.bytes), budget=problem.budget, causes=causes, remedies=changes
        ),
    )


def _budget(budget: int) -> str:
    """A budget of a few bytes is a number whose unit was forgotten."""
    unit = f' (a number without a unit is bytes; write "{budget}GB")' if budget < 1_000 else ""
    return f"{format_budget(budget)}{unit}"


def _do(changes: Sequence[str]) -> str:
    """``Do: ...``, on a line of its own."""
    if len(changes) > 1:
        listed = ",\n    ".join(changes)
        return f"\n  Do one of these:\n    {listed}."
    return f"\n  Do: {changes[0]}." if changes else ""


def _more_memory(problem: Problem) -> str:
    """Where no change of arguments, ranks or length is enough."""
    whole = whole_bytes(problem.memory)
    alone = " and ".join(whole) or "nothing"
    return f"give more memory: {alone} alone take {format_bytes(sum(whole.values()))}"
