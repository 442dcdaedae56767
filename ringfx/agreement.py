"""Do all ranks run the same program on the same inputs? Asked before the first collective.

A rank that was fed other data (a DistributedSampler left in place), started from other weights or
compiled another program would give wrong numbers or a hang. One small message a call finds out:
a digest of graph and plan, a checksum of integer inputs, and, on the first call, a checksum of
floating-point inputs and parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ringfx.errors import AgreementError
from ringfx.ops.ranks import Ranks
from ringfx.world import World, process_group

__all__ = ["Agreement", "checksum", "raw_bytes"]

_GENERATOR = "the random generator"
WORDS = 1 << 20
"""Words of 8 bytes that a checksum reads at a time."""


class Agreement:
    """The checks of one program on one rank."""

    def __init__(
        self,
        world: World,
        digest: str,
        names: Sequence[str],
        summary: str,
        generators: Sequence[torch.device] = (),
        evaluating: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """``generators``: devices whose default generator the program draws from.

        ``evaluating``: names of the model's modules in evaluation mode, asked to explain an error.
        """
        self._world = world
        self._digest = digest
        self._names = (*names, *(f"{_GENERATOR} of {device}" for device in generators))
        self._generators = tuple(generators)
        self._summary = summary
        self._evaluating = evaluating
        self._first = True
        self._known: dict[int, int] = {}
        """Sums of inputs that have not changed, by their number."""

    def check(self, inputs: Sequence[Any], unchanged: Collection[int] = ()) -> None:
        """Compare with the other ranks; collective.

        ``unchanged``: inputs that hold what they always did, whose sums are known.

        Raises
        ------
        AgreementError
            On every rank, naming what differs and both sides.
        """
        if self._world.size == 1:
            return
        inputs = [*inputs, *map(_generator_state, self._generators)]
        sums = [self._sum(value, i if i in unchanged else None) for i, value in enumerate(inputs)]
        self._first = False
        combined = hashlib.sha256(repr((sums, _recorded(inputs))).encode()).digest()
        mine = torch.tensor([_int(bytes.fromhex(self._digest)), _int(combined)], dtype=torch.int64)
        if all(bool((other == mine).all()) for other in self._everyone(mine)):
            return
        self._explain(sums, inputs)

    def _sum(self, value: Any, known: int | None) -> int | None:
        if not isinstance(value, torch.Tensor):
            return hash(value) if isinstance(value, (int, float, bool)) else None
        steady = value.is_floating_point() or value.is_complex()
        if steady and not self._first:
            return None
        if known is None:
            return checksum(value)
        if known not in self._known:
            self._known[known] = checksum(value)
        return self._known[known]

    def _everyone(self, mine: torch.Tensor) -> list[torch.Tensor]:
        group = process_group(self._world.group)
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        mine = mine.to(device)
        others = [torch.empty_like(mine) for _ in range(self._world.size)]
        self._speak(lambda: dist.all_gather(others, mine, group=group))
        return [o.cpu() for o in others]

    def _speak(self, call: Callable[[], Any]) -> None:
        ranks = Ranks.named(self._world.group, "before the call")
        ranks.guarded("comparison of inputs", "all ranks", call)

    def _explain(self, sums: Sequence[int | None], inputs: Sequence[Any]) -> None:
        group = process_group(self._world.group)
        said: list[Any] = [None] * self._world.size
        shapes = [_shape(v) for v in inputs]
        modes = (torch.is_grad_enabled(), _recorded(inputs), tuple(self._evaluating()))
        mine = (self._digest, self._summary, self._names, shapes, sums, modes)
        self._speak(lambda: dist.all_gather_object(said, mine, group=group))
        raise AgreementError(_difference(said))


def _difference(said: Sequence[Any]) -> str:
    digest, summary, names, shapes, sums, modes = said[0]
    for rank, other in enumerate(said[1:], 1):
        other_mode = _different_modes(rank, names, modes, other[2], other[5])
        if other_mode:
            return other_mode
        if other[2] != names or other[3] != shapes:
            return _different_shapes(rank, said[0], other)
        if other[0] != digest:
            return (
                f"rank 0 and rank {rank} made different plans from the same shapes.\n"
                f"  rank 0: {summary}\n  rank {rank}: {other[1]}\n"
                "Do: give every rank the same options, code and profile."
            )
        for name, mine, theirs in zip(names, sums, other[4], strict=True):
            if mine != theirs and name.startswith(_GENERATOR):
                return (
                    f"{name} is in another state on rank 0 than on rank {rank}, and the model "
                    "draws from it: every rank must draw the same numbers. Do: call "
                    "torch.manual_seed(seed) with one seed on all ranks before training, and draw "
                    "what differs between ranks from a torch.Generator of its own."
                )
            if mine != theirs:
                return (
                    f"{name} has the same shape but other values on rank 0 (checksum {mine}) and "
                    f"rank {rank} (checksum {theirs}). Ringfx splits one sequence over the ranks, "
                    "so all of them must be given the same inputs and weights. Do: remove a "
                    "DistributedSampler over these ranks, seed before building the model, or "
                    "broadcast parameters from rank 0."
                )
    return "the ranks disagree, and agree when asked again: inputs changed between two looks."


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
            f"rank {off} runs this call under torch.no_grad() or inference_mode() and rank "
            f"{rank - off} does not: they would wait for each other in backward. Do: enter it on "
            "every rank or on none."
        )
    if evaluating != their_evaluating:
        differ = sorted(set(evaluating) ^ set(their_evaluating))
        side = 0 if differ[0] in evaluating else rank
        return (
            f"{differ[0] or 'the model'} is in evaluation mode on rank {side} and in training mode "
            f"on rank {rank - side}{_more(differ)}, and the ranks would run different programs. "
            "Do: call model.train() or model.eval() on every rank alike."
        )
    first = {n for n, w in zip(names, wanted, strict=False) if w}
    second = {n for n, w in zip(other_names, their_wanted, strict=False) if w}
    differ = sorted((first ^ second) & set(names) & set(other_names))
    if differ:
        side = 0 if differ[0] in first else rank
        return (
            f"{differ[0]} requires a gradient on rank {side} and not on rank {rank - side}"
            f"{_more(differ)}. Do: freeze the same parameters on every rank."
        )
    return None


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def _different_shapes(rank: int, first: Any, other: Any) -> str:
    mine = dict(zip(first[2], first[3], strict=True))
    theirs = dict(zip(other[2], other[3], strict=True))
    names = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
    lines = [
        f"  {n}: rank 0 {mine.get(n, 'absent')}, rank {rank} {theirs.get(n, 'absent')}"
        for n in names[:8]
    ]
    return (
        f"rank 0 and rank {rank} were given inputs of different shapes:\n" + "\n".join(lines) + "\n"
        "Do: give every rank the whole, identical batch; ringfx splits it along the tokens."
    )


def _recorded(inputs: Sequence[Any]) -> list[bool]:
    """Which inputs this call keeps gradients for."""
    recording = torch.is_grad_enabled()
    return [recording and isinstance(x, torch.Tensor) and x.requires_grad for x in inputs]


def _generator_state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return repr(value)


def _int(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)


@torch.no_grad()
def checksum(value: torch.Tensor) -> int:
    """A hash of a tensor's bytes and their places, 64 bits."""
    raw = raw_bytes(value)
    whole = raw.numel() // 8 * 8
    raw = raw.clone() if raw.storage_offset() % 8 else raw
    words = raw[:whole].view(torch.int64)
    rest = torch.nn.functional.pad(raw[whole:], (0, whole + 8 - raw.numel())).view(torch.int64)
    total = _mixed(rest, -1)
    for start in range(0, words.numel(), WORDS):
        total = total + _mixed(words[start : start + WORDS], start)
    return int(total.item())


@torch.no_grad()
def raw_bytes(value: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes in order, uint8 [bytes]."""
    plain = value.detach().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8)


def _mixed(words: torch.Tensor, start: int) -> torch.Tensor:
    """The sum of SplitMix64's finaliser over each word and its place."""
    place = torch.arange(start, start + words.numel(), device=words.device)
    mixed = words + place * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)).sum()
