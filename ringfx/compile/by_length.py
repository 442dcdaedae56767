"""A program that Dynamo captured once, for every length of data that comes.

For a new length the passes run, as for any program: what the ranks hold, the plan and what is
announced are that length's own. What is compiled is shared: the first length's local program is
compared with those of two others (``general.py``), and compiled once with symbols for sizes. A
length is served by it if the program that the passes wrote for this length is the compiled one,
number by number; else one is compiled for it.
"""

from __future__ import annotations

import contextlib
import glob
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ringfx.compile.compilers import Compiled
from ringfx.compile.general import Affine, Outline, fitted, generalized, outlined
from ringfx.compile.open_program import OpenProgram
from ringfx.compile.pipeline import Lowered
from ringfx.compile.runner import Runner
from ringfx.compile.settings import Settings
from ringfx.errors import OutOfMemory, RingfxError, StrategyRefused
from ringfx.failures.channel import shared_call
from ringfx.ir.plan import Plan
from ringfx.passes.verify.check import line_inputs
from ringfx.torch_compat.autograd import without_saved_tensor_hooks
from ringfx.torch_compat.dynamo import TorchDynamoException
from ringfx.torch_compat.symbols import Condition, conditions, symbol_of, traced_with_symbols
from ringfx.watch.stages import preparing, stage_done

if TYPE_CHECKING:
    from ringfx.compile.backend import Backend

__all__ = ["ByLength"]

log = logging.getLogger("ringfx")

MOST_PROGRAMS = 4
"""From then on a length takes the strategies of a program that there is."""
SLOWER = 1.05
"""So many times the predicted time of its own choice are good enough for a length."""
MOST_KEPT = 512
"""Lengths whose plans and indices are kept; the passes run again for others."""

EXAMPLES = 3
"""Lengths whose programs are compared: two for a function, one to check it."""
NEAR = (1, 2, 3, -1, -2, -3)
"""Chunks of each rank by which another length differs."""
FARTHER = (1, 2, -1, -2, 16, 32, 64, 128, 192)
"""The same, for a model that wants whole blocks of tokens."""

Numbers = Mapping[str, int]
Lower = Callable[[Numbers, Sequence[Any], Settings], Lowered]
"""What the passes make of the program where its symbols are these numbers."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _General:
    """A compiled program that serves several lengths."""

    outline: Outline
    functions: tuple[Affine, ...]
    compiled: Compiled
    symbols: tuple[str | None, ...]
    """Of its bases."""
    holds: Condition
    """What its compiler has assumed of them."""
    plan: Plan

    def serves(self, outline: Outline) -> bool:
        """Whether it is the program of this outline, number by number."""
        if outline.text != self.outline.text:
            return False
        bases = outline.bases
        same = all(f.at(bases) == n for f, n in zip(self.functions, outline.numbers, strict=True))
        return same and self.holds_at(bases)

    def holds_at(self, bases: Sequence[int]) -> bool:
        return self.holds({s: n for s, n in zip(self.symbols, bases, strict=True) if s})

    def at(self, bases: Sequence[int]) -> Compiled:
        return partial(_run, self.compiled, tuple(bases))


def _run(compiled: Compiled, bases: tuple[int, ...], *inputs: Any) -> Sequence[Any]:
    return compiled(*inputs, *bases)


class _NotGeneral(Exception):
    """Why a program serves one length only."""


class ByLength:
    """Runs the program of each length, and makes it when it first comes."""

    def __init__(
        self, backend: Backend, program: OpenProgram, lengths: Sequence[str], lower: Lower
    ) -> None:
        self._backend, self._program, self._lengths = backend, program, tuple(lengths)
        self._places = [program.symbols[name] for name in self._lengths]
        self._lower = lower
        self._programs: list[_General] = []
        self._runners: dict[tuple[int, ...], Runner] = {}

    def __call__(self, *inputs: Any) -> list[Any]:
        key = tuple(int(inputs[i]) for i in self._places)
        if key not in self._runners:
            world = self._backend.world
            name = f"program at {key}"
            with (
                shared_call(world.group, begins=False),
                _as_in_dynamo(),
                preparing(name, rank=world.rank),
            ):
                lowered = self._lower(self._numbers(key), inputs, self._backend.settings)
                self.add(key, lowered, inputs)
                stage_done("compiled")
        return self._runners[key](*inputs)

    def add(self, key: tuple[int, ...], lowered: Lowered, inputs: Sequence[Any]) -> None:
        """The program of a length that the passes have written."""
        lowered, compiled = self._with_program(key, lowered, inputs)
        self._backend.accept(lowered)
        lines, device = lowered.local.placement.lines, lowered.local.placement.device
        extra = line_inputs(lines, self._backend.world.rank, device)
        if len(self._runners) >= MOST_KEPT:
            del self._runners[next(iter(self._runners))]
        self._runners[key] = Runner(lowered, compiled, extra, self._backend, {})

    def _numbers(self, key: Sequence[int]) -> dict[str, int]:
        return {**self._program.traced, **dict(zip(self._lengths, key, strict=True))}

    def _with_program(
        self, key: tuple[int, ...], lowered: Lowered, inputs: Sequence[Any]
    ) -> tuple[Lowered, Compiled]:
        for made in self._alternatives(key, lowered, inputs):
            outline = self._outlined(made, key)
            for program in self._programs:
                if outline is not None and program.serves(outline):
                    return made, program.at(outline.bases)
        try:
            program = self._general(key, lowered, inputs)
        except _NotGeneral as why:
            self._backend.announce(
                f"one program cannot serve a range of lengths here: {why}. Each length that needs "
                "its own compiles one"
            )
            return lowered, self._own(lowered, inputs)
        self._programs.append(program)
        return lowered, program.at(program.outline.bases)

    def _alternatives(
        self, key: tuple[int, ...], lowered: Lowered, inputs: Sequence[Any]
    ) -> Iterator[Lowered]:
        """The program as it was chosen, and with the strategies of those that there are."""
        yield lowered
        tried = [_strategies(lowered.plan)]
        for program in self._programs:
            if (chosen := _strategies(program.plan)) in tried:
                continue
            tried.append(chosen)
            try:
                again = self._lower(self._numbers(key), inputs, self._with(chosen))
            except (OutOfMemory, StrategyRefused):
                continue
            is_fast = again.plan.total_ms <= SLOWER * lowered.plan.total_ms
            if is_fast or len(self._programs) >= MOST_PROGRAMS:
                yield again

    def _with(self, strategies: Mapping[str, str]) -> Settings:
        settings = self._backend.settings
        return replace(settings, strategy=strategies or settings.strategy)

    def _outlined(self, lowered: Lowered, key: tuple[int, ...]) -> Outline | None:
        try:
            return outlined(lowered.local, key)
        except ValueError as why:
            log.info("no program for a range of lengths: %s", why)
            return None

    def _general(self, key: tuple[int, ...], lowered: Lowered, inputs: Sequence[Any]) -> _General:
        """Compiled for this length and others like it."""
        try:
            outlines = [outlined(lowered.local, key)]
        except ValueError as why:
            raise _NotGeneral(str(why)) from why
        settings = self._with(_strategies(lowered.plan))
        for other in self._others(key):
            if len(outlines) == EXAMPLES:
                break
            try:
                made = self._lower(self._numbers(other), inputs, settings)
                outline = outlined(made.local, other)
            except (RingfxError, TorchDynamoException, ValueError):
                continue  # the model may not take this length at all
            alike = outline.text == outlines[0].text
            if alike and not any(
                a == b for x in outlines for a, b in zip(x.bases, outline.bases, strict=True)
            ):
                outlines.append(outline)
        if len(outlines) < EXAMPLES:
            raise _NotGeneral("other lengths have programs of another form")
        functions = fitted(outlines)
        if functions is None:
            raise _NotGeneral("it holds a number that is no multiple of the length plus a constant")
        return self._compiled(lowered, inputs, outlines, functions)

    def _others(self, key: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Lengths whose programs should be like this one's; the nearest first."""
        chunks = 2 * self._backend.world.size
        tried = [(k, True) for k in NEAR] + [(k, False) for k in FARTHER]
        for steps, varies in tried:
            other = tuple(
                n + steps * (1 + i) * chunks + (_turned(n, steps, chunks) if varies else 0)
                for i, n in enumerate(key)
            )
            if min(other) > 1 and self._program.holds(self._numbers(other)):
                yield other

    def _compiled(
        self,
        lowered: Lowered,
        inputs: Sequence[Any],
        outlines: Sequence[Outline],
        functions: tuple[Affine, ...],
    ) -> _General:
        local, first = lowered.local, outlines[0]
        gm, forms = generalized(local, functions, len(first.bases))
        with traced_with_symbols(first.bases) as (mode, bases):
            names = tuple(map(symbol_of, bases))
            given = self._examples(lowered, inputs)
            for i, form in enumerate(forms):
                with mode:
                    given[i] = _with_symbols(given[i], form, bases)
            compiled = self._backend.compiled(lowered, gm, [*given, *bases])
            holds = conditions(mode)
        made = _General(
            outline=first, functions=functions, compiled=compiled, symbols=names, holds=holds,
            plan=lowered.plan,
        )  # fmt: skip
        if not all(made.holds_at(x.bases) for x in outlines):
            raise _NotGeneral("its compiler has made it for this length alone")
        return made

    def _own(self, lowered: Lowered, inputs: Sequence[Any]) -> Compiled:
        """Compiled for this length alone."""
        with traced_with_symbols(()) as (mode, _):
            given = self._examples(lowered, inputs)
            for i in self._program.tensors:
                with mode:
                    given[i] = torch.empty_strided(
                        given[i].shape, given[i].stride(), dtype=given[i].dtype,
                        device=given[i].device, requires_grad=given[i].requires_grad,
                    )  # fmt: skip
            return self._backend.compiled(lowered, lowered.local.graph_module, given)

    def _examples(self, lowered: Lowered, inputs: Sequence[Any]) -> list[Any]:
        """What the program is compiled for, in the mode of the moment; parameters as they are."""
        placement = lowered.local.placement
        extra = line_inputs(placement.lines, self._backend.world.rank, placement.device)
        return [*inputs, *extra]


@contextlib.contextmanager
def _as_in_dynamo() -> Iterator[None]:
    """What Dynamo does around a backend: no number is drawn, and no hook of the user is asked."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), without_saved_tensor_hooks():
        yield


def _turned(length: int, steps: int, chunks: int) -> int:
    """What makes each other length have other tokens beside its whole chunks: with them a number
    of tokens is no function of the number of chunks. A length of whole chunks stays one."""
    rest = length % chunks
    return 0 if rest == 0 or steps % 2 == 0 else rest % (chunks - 1) + 1 - rest


def _with_symbols(value: Any, form: Sequence[Affine], bases: Sequence[Any]) -> Any:
    """An input with symbols for the sizes that are open."""
    if all(f.times == 0 for f in form):
        return value
    found = [f.at(bases) for f in form]
    if not isinstance(value, torch.Tensor):
        return found[0]
    sizes, strides = found[: value.dim()], found[value.dim() :]
    made = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    return made.requires_grad_(value.requires_grad)


def _strategies(plan: Plan) -> Mapping[str, str]:
    """The strategy of each layer that is split, by a glob that only its path matches."""
    return {
        glob.escape(x.name): x.strategy
        for x in plan.layers
        if x.name and not (x.is_replicated or x.is_local)
    }
