"""Do all ranks run the same program on the same inputs? Asked before the first collective.

A rank that was fed other data (a DistributedSampler left in place), started from other weights or
compiled another program would give wrong numbers or a hang. One small message a call finds out:
a digest of graph and plan, and a checksum of the inputs. Parameters and float buffers are summed
whole on a program's first call, and from then on in turn: 1/N of their bytes on each call that
keeps gradients, so that ranks that come apart (another learning rate, a step that one rank skips)
are found within N calls. A sum reads memory once, where a training step computes with every word
for each token: at N = 100 that is far below 1% of a step. Of sharded parameters, whose rows differ,
what optimizers did with them is compared in every call.

Sums are made where the tensors are and fetched together, once a call; that waits for what the
device has been given before.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from ringfx.comm.process_group import Ranks
from ringfx.comm.rendezvous import all_gather_texts, meet
from ringfx.comm.world import World
from ringfx.compile.optimizer_steps import Steps, steps_of
from ringfx.compile.rank_differences import (
    GENERATOR,
    difference,
    different_calls,
    different_shapes,
)
from ringfx.errors import AgreementError
from ringfx.failures.channel import settled
from ringfx.failures.describe import call_site
from ringfx.torch_compat.pytree import keystr, tree_leaves_with_path

__all__ = ["Agreement", "Turns", "checksum", "compare_shapes", "raw_bytes"]

WORDS = 1 << 20
"""Words of 8 bytes that a checksum reads at a time."""

EVERY = 100
"""Calls in which all parameters are compared once."""

WHAT = "a call of the model: comparison of inputs"


AT_FIRST = "the first call of the model: comparison of shapes"


def compare_shapes(
    world: World, model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Before anything of a model is traced; collective, one small message.

    What differs would be found when the first program runs, but for a model whose own code fails
    on what one rank has, and only after minutes of compilation.

    Raises
    ------
    AgreementError
        On every rank, with the shapes of rank 0 and of one that was given others.
    """
    if world.size == 1:
        return
    ranks, mine = Ranks.named(world.group, "before the call"), _given_shapes(model, args, kwargs)
    digest = _digest(sorted(mine.items()))
    if all(other == digest for (other,) in meet(ranks, AT_FIRST, [digest])):
        return
    said = [json.loads(x) for x in all_gather_texts(ranks, AT_FIRST, json.dumps(mine).encode())]
    rank = next(r for r, given in enumerate(said) if given != said[0])
    raise settled(AgreementError(different_shapes(rank, said[0], said[rank])))


def _given_shapes(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Of each tensor in the arguments, by the names that ``forward`` has for them."""
    names: list[str] = []
    with contextlib.suppress(TypeError, ValueError):  # a callable that does not say
        names = [*inspect.signature(model.forward).parameters][: len(args)]
    names += [f"argument {i}" for i in range(len(names), len(args))]
    given = {**dict(zip(names, args, strict=True)), **kwargs}
    return {
        f"{name}{keystr(path)}": _shape(value)
        for name, argument in given.items()
        for path, value in tree_leaves_with_path(argument)
        if isinstance(value, torch.Tensor)
    }


class Turns:
    """Whose turn it is: in call number n the part n mod ``every`` of all parameters is compared."""

    def __init__(self, check_inputs: bool | int) -> None:
        self.every = EVERY if check_inputs is True else int(check_inputs)
        self.number = 0

    def parts(self, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
        """(tensor, first byte, end) of this call, where tensors of these sizes lie in a row."""
        total = sum(sizes)
        turn = self.number % self.every
        start, end = (_aligned(total * t // self.every) for t in (turn, turn + 1))
        end = max(total, end) if turn == self.every - 1 else end
        found, place = [], 0
        for i, size in enumerate(sizes):
            first, last = max(start, place), min(end, place + size)
            if first < last:
                found.append((i, first - place, last - place))
            place += size
        return found


def _aligned(size: int) -> int:
    return size // 4096 * 4096


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """What one rank says of its inputs; None: not compared in this call."""

    inputs: Sequence[int | None]
    turn: Sequence[tuple[int, int]]
    """(input, sum) of the parts whose turn it is."""

    steps: Mapping[str, Steps]
    """Of each sharded parameter."""


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
        turns: Turns | None = None,
        buffers: Collection[int] = (),
    ) -> None:
        """``generators``: devices whose default generator the program draws from.

        ``evaluating``: names of the model's modules in evaluation mode, asked to explain an error.
        ``buffers``: inputs that are the model's, as its parameters are.
        """
        self._world = world
        self._digest = digest
        self._names = (*names, *(f"{GENERATOR} of {device}" for device in generators))
        self._generators = tuple(generators)
        self._summary = summary
        self._evaluating = evaluating
        self._turns = turns or Turns(True)
        self._buffers = frozenset(buffers)
        self._first = True
        self._known: dict[int, int] = {}
        """Sums of inputs that have not changed, by their number."""

    def check(
        self,
        inputs: Sequence[Any],
        unchanged: Collection[int] = (),
        rows: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Compare with the other ranks; collective.

        ``unchanged``: inputs that hold what they always did, whose sums are known. ``rows``:
        parameters that are sharded, by name.

        Raises
        ------
        AgreementError
            On every rank, naming what differs and both sides.
        """
        if self._world.size == 1:
            return
        inputs = [*inputs, *map(_generator_state, self._generators)]
        first, number = self._first, self._turns.number
        steps = {name: steps_of(row) for name, row in (rows or {}).items()}
        sums = self._sums(inputs, unchanged, steps, all_of_them=first)
        said = self._meet(sums, inputs, first, number)
        if any(row[3] for row in said) and not all(row[3] for row in said):
            sums = self._sums(inputs, unchanged, steps, all_of_them=True)  # another is at its first
            said = self._meet(sums, inputs, True, number)
        if len({row[2] for row in said}) > 1:  # a rank has lost a call: compare turns from the next
            self._turns.number = max(row[2] for row in said)
            said = [[*row[:2], 0, row[3], 0, row[5]] for row in said]
        if any(row != said[0] for row in said):
            self._explain(sums, inputs, number)
        self._first = False

    def _meet(
        self, sums: _Sums, inputs: Sequence[Any], first: bool, number: int
    ) -> list[list[int]]:
        combined = _digest((sums.inputs, _recorded(inputs)))
        program = _int(bytes.fromhex(self._digest))
        turn = _digest(sums.turn)
        stepped = _digest([(s.number, s.alike) for s in sums.steps.values()])
        return meet(self._ranks(), WHAT, (program, combined, number, int(first), turn, stepped))

    def _sums(
        self,
        inputs: Sequence[Any],
        unchanged: Collection[int],
        steps: Mapping[str, Steps],
        *,
        all_of_them: bool,
    ) -> _Sums:
        """Sums of everything that is compared in this call, fetched together."""
        steady = [i for i, value in enumerate(inputs) if self._is_steady(i, value)]
        wanted = [
            i
            for i, value in enumerate(inputs)
            if isinstance(value, torch.Tensor)
            and (all_of_them or i not in steady)
            and not (i in unchanged and i in self._known)
        ]
        turn = self._parts(inputs, steady)
        found = _fetched(
            [*(_sum(raw_bytes(inputs[i])) for i in wanted), *(_sum(raw) for _, raw in turn)]
        )
        new = dict(zip(wanted, found, strict=False))
        self._known |= {i: value for i, value in new.items() if i in unchanged}
        known = {
            i: self._known[i]
            for i in unchanged
            if i in self._known and (all_of_them or i not in steady)
        }
        sums = {**known, **new}
        return _Sums(
            inputs=[sums.get(i, _number(value)) for i, value in enumerate(inputs)],
            turn=[(i, s) for (i, _), s in zip(turn, found[len(wanted) :], strict=True)],
            steps=steps,
        )

    def _is_steady(self, index: int, value: Any) -> bool:
        """Whether it is a weight: what a call is given may be another thing each time."""
        if not isinstance(value, torch.Tensor):
            return False
        numbers = value.is_floating_point() or value.is_complex()
        return numbers and (isinstance(value, torch.nn.Parameter) or index in self._buffers)

    def _parts(self, inputs: Sequence[Any], steady: Sequence[int]) -> list[tuple[int, Any]]:
        """The bytes whose turn it is; none in a call that keeps no gradients."""
        if not torch.is_grad_enabled():
            return []
        local = [_local(inputs[i]) for i in steady]
        sizes = [x.numel() * x.element_size() for x in local]
        return [
            (steady[i], raw_bytes(local[i])[start:end])
            for i, start, end in self._turns.parts(sizes)
        ]

    def _ranks(self) -> Ranks:
        return Ranks.named(self._world.group, "before the call")

    def _explain(self, sums: _Sums, inputs: Sequence[Any], number: int) -> None:
        shapes = [_shape(v) for v in inputs]
        modes = (torch.is_grad_enabled(), _recorded(inputs), tuple(self._evaluating()))
        stepped = {name: astuple(s) for name, s in sums.steps.items()}
        mine = {
            "digest": self._digest, "summary": self._summary, "names": self._names,
            "shapes": shapes, "sums": sums.inputs, "modes": modes, "turn": sums.turn,
            "steps": stepped,
        }  # fmt: skip
        told = all_gather_texts(
            self._ranks(), WHAT, json.dumps((mine, number, call_site())).encode()
        )
        said, numbers, sites = zip(*map(json.loads, told), strict=True)
        raise settled(AgreementError(difference(said) + different_calls(numbers, sites)))


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


def checksum(value: torch.Tensor) -> int:
    """A hash of a tensor's bytes and their places, 64 bits."""
    return int(_sum(raw_bytes(value)).item())


@torch.no_grad()
def _sum(raw: torch.Tensor) -> torch.Tensor:
    """``checksum`` of these bytes, where they are: int64 []."""
    whole = raw.numel() // 8 * 8
    raw = raw.clone() if raw.storage_offset() % 8 else raw
    words = raw[:whole].view(torch.int64)
    rest = torch.nn.functional.pad(raw[whole:], (0, whole + 8 - raw.numel())).view(torch.int64)
    total = _mixed(rest, -1)
    for start in range(0, words.numel(), WORDS):
        total = total + _mixed(words[start : start + WORDS], start)
    return total


def _fetched(sums: Sequence[torch.Tensor]) -> list[int]:
    """Their values, one transfer for each device."""
    found: list[int] = [0] * len(sums)
    for device in {x.device for x in sums}:
        there = [i for i, x in enumerate(sums) if x.device == device]
        for i, value in zip(there, torch.stack([sums[i] for i in there]).tolist(), strict=True):
            found[i] = value
    return found


def _number(value: Any) -> int | None:
    return hash(value) if isinstance(value, (int, float, bool)) else None


def _digest(value: Any) -> int:
    return _int(hashlib.sha256(repr(value).encode()).digest())


@torch.no_grad()
def raw_bytes(value: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes in order, uint8 [bytes]."""
    plain = _local(value).detach().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8)


def _local(value: torch.Tensor) -> torch.Tensor:
    """A parameter's part on this rank, where it is a DTensor."""
    given: Any = value
    part: torch.Tensor = given.to_local() if hasattr(given, "device_mesh") else given
    return part


def _mixed(words: torch.Tensor, start: int) -> torch.Tensor:
    """The sum of SplitMix64's finaliser over each word and its place."""
    place = torch.arange(start, start + words.numel(), device=words.device)
    mixed = words + place * -0x61C8864680B583EB
    mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
    mixed = (mixed ^ (mixed >> 27)) * -0x6B2FB644ECCEEE15
    return (mixed ^ (mixed >> 31)).sum()
