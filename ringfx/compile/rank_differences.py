"""What differs between ranks that were compared, in words: for ``rank_agreement``.

The first difference is told in the order in which one explains the other: modes, shapes, programs,
inputs, parameters, optimizer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ringfx.compile.optimizer_steps import Steps

__all__ = ["GENERATOR", "difference", "different_calls", "different_shapes"]

GENERATOR = "the random generator"


def different_calls(numbers: Sequence[int], sites: Sequence[str]) -> str:
    """What ranks are given differs because they are not in the same call."""
    if len(set(numbers)) == 1 and len(set(sites)) == 1:
        return ""
    listed = ", ".join(
        f"rank {r} at {site} (its call {n} of this model)"
        for r, (n, site) in enumerate(zip(numbers, sites, strict=True))
    )
    return (
        f" The ranks are in different calls: {listed}. One rank makes a call that the others do "
        "not make (`if rank == 0: model(...)`), or an error has ended a call on one rank. Do: "
        "make the same calls on every rank."
    )


def difference(said: Sequence[Mapping[str, Any]]) -> str:
    """Between rank 0 and the first rank that is otherwise, of what each says of its call."""
    mine = said[0]
    names = mine["names"]
    for rank, other in enumerate(said[1:], 1):
        other_mode = _different_modes(rank, names, mine["modes"], other["names"], other["modes"])
        if other_mode:
            return other_mode
        if (other["names"], other["shapes"]) != (names, mine["shapes"]):
            here, there = (dict(zip(x["names"], x["shapes"], strict=True)) for x in (mine, other))
            return different_shapes(rank, here, there)
        if other["digest"] != mine["digest"]:
            return (
                f"rank 0 and rank {rank} made different plans from the same shapes.\n"
                f"  rank 0: {mine['summary']}\n"
                f"  rank {rank}: {other['summary']}\n"
                "Do: use the same options, code and profile on every rank."
            )
        for name, here, there in zip(names, mine["sums"], other["sums"], strict=True):
            if here != there and name.startswith(GENERATOR):
                return (
                    f"{name} is in different states on rank 0 and rank {rank}, and the model "
                    "draws random numbers from it: every rank must draw the same numbers. Do: "
                    "call torch.manual_seed(seed) with the same seed on all ranks before "
                    "training; for numbers that differ between ranks, use a torch.Generator of "
                    "their own."
                )
            if here != there:
                return (
                    f"{name} has the same shape but different values on rank 0 (checksum {here}) "
                    f"and rank {rank} (checksum {there}). Ringfx splits one sequence over the "
                    "ranks, so all ranks must be given the same inputs and weights. Do: load data "
                    "with ringfx.data.SequenceGroupSampler instead of a DistributedSampler (under "
                    "Trainer: ringfx.integrations.transformers.prepare(trainer); accelerate: "
                    "ringfx.integrations.accelerate.prepare(accelerator)); seed before building "
                    "the model; or broadcast parameters from rank 0."
                )
        for (i, here), (j, there) in zip(mine["turn"], other["turn"], strict=False):
            if i == j and here != there:
                return (
                    f"{names[i]} has diverged: it was equal on all ranks at the first call, and "
                    f"now its values differ between rank 0 (checksum {here}) and rank {rank} "
                    f"(checksum {there}). Every rank must make the same optimizer steps with the "
                    "same learning rate. Do: look for a scheduler, a gradient scaler or a "
                    "skipped step that differs between ranks; or broadcast parameters from rank "
                    "0."
                )
        if other["steps"] != mine["steps"]:
            return _different_steps(rank, mine["steps"], other["steps"])
    return (
        "the inputs differed between ranks in a first comparison, but not in a second: they "
        "changed between the two. Do: write to no input while the model is called."
    )


def _different_steps(rank: int, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    differ = [name for name in mine if mine[name] != theirs.get(name)]
    here, there = (Steps(*steps[differ[0]]) for steps in (mine, theirs))
    how = (
        f"has had {here.number} optimizer steps on rank 0 and {there.number} on rank {rank}"
        if here.number != there.number
        else f"was stepped with other settings, the last time {here.others_than(there)} on rank 0 "
        f"and {there.others_than(here)} on rank {rank}"
    )
    return (
        f"{differ[0]}{_more(differ)}, of which each rank holds its rows, {how}: the rows no longer "
        "belong together. Do: make the same optimizer steps with the same settings on every rank "
        "(look for a skipped step, gradients that one rank has set to None, a scheduler or a "
        "gradient scaler that differs between ranks), and start from a checkpoint of before."
    )


def _different_modes(
    rank: int, names: Sequence[str], mine: Any, other_names: Sequence[str], theirs: Any
) -> str | None:
    """One rank trains and the other evaluates, or keeps no gradients, or for other tensors."""
    (recording, wanted, evaluating), (their_recording, their_wanted, their_evaluating) = (
        mine,
        theirs,
    )
    if recording != their_recording:
        off = rank if recording else 0
        return (
            f"rank {off} runs this call under torch.no_grad() or inference_mode(), but rank "
            f"{rank - off} does not: the ranks would wait for each other in backward. Do: use it "
            "on every rank or on none."
        )
    if evaluating != their_evaluating:
        differ = sorted(set(evaluating) ^ set(their_evaluating))
        side = 0 if differ[0] in evaluating else rank
        return (
            f"{differ[0] or 'the model'} is in evaluation mode on rank {side} and in training "
            f"mode on rank {rank - side}{_more(differ)}: the ranks would run different programs. "
            "Do: call model.train() or model.eval() on every rank alike."
        )
    first = {n for n, w in zip(names, wanted, strict=False) if w}
    second = {n for n, w in zip(other_names, their_wanted, strict=False) if w}
    differ = sorted((first ^ second) & set(names) & set(other_names))
    if differ:
        side = 0 if differ[0] in first else rank
        return (
            f"{differ[0]} requires a gradient on rank {side} but not on rank "
            f"{rank - side}{_more(differ)}. Do: freeze the same parameters on every rank."
        )
    return None


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def different_shapes(rank: int, mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """By the names of tensors."""
    names = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
    lines = [
        f"  {n}: rank 0 {mine.get(n, 'absent')}, rank {rank} {theirs.get(n, 'absent')}"
        for n in names[:8]
    ]
    not_used = (  # not given, or not used by what the rank runs
        " What is absent is not used by that rank's program: look for a hook, a branch or an "
        "exception in the model that differs between ranks."
        if mine.keys() != theirs.keys()
        else ""
    )
    return (
        f"rank 0 and rank {rank} were given inputs of different shapes:\n"
        + "\n".join(lines)
        + "\nDo: give every rank the same full batch; ringfx splits it along the tokens."
        + not_used
    )
