"""The Dynamo backend: plan and rewrite a graph, and hand it to a compiler."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from ringfx.comm.grad_accumulation import Accumulation
from ringfx.comm.state_ranks import ONE_RANK, StateRanks
from ringfx.comm.world import World
from ringfx.compile.by_length import ByLength
from ringfx.compile.compilers import Compiled, compile_bodies, compile_local_program
from ringfx.compile.dynamo import for_ringfx, prepare_tracing
from ringfx.compile.observed import observer
from ringfx.compile.open_program import OpenProgram, lengths_in, specialize
from ringfx.compile.pipeline import Lowered, lower
from ringfx.compile.rank_agreement import Turns, compare_shapes
from ringfx.compile.runner import Runner
from ringfx.compile.settings import Settings
from ringfx.compile.states import example_of_part
from ringfx.compile.tensor_parallel import NO_PARTS, Parts, name_groups, spread_tokens
from ringfx.compile.why_unsplit import Refusals, why_unsplit
from ringfx.cost_model import Profile
from ringfx.cost_model.calibration.shared_profile import agreed_profile
from ringfx.errors import (
    AgreementError,
    AttentionNotFound,
    InvalidArgument,
    OutOfMemory,
    RingfxError,
    VerificationError,
)
from ringfx.failures.channel import shared_call
from ringfx.ir.note import NoteKind, texts_of
from ringfx.ir.plan import Plan, joined
from ringfx.ir.values import Arrival, Collective
from ringfx.passes.capture.breaks import is_outermost, reads_gradients
from ringfx.passes.capture.precision import autocast_off
from ringfx.passes.capture.trace import name_arguments, named_inputs
from ringfx.passes.place.min_cut import home_device
from ringfx.passes.tensor_parallel import example_parts
from ringfx.passes.verify.check import line_inputs
from ringfx.split_tensor.handoff import ProgramHandoff, global_example, is_split, local_example
from ringfx.torch_compat.autograd import without_saved_tensor_hooks
from ringfx.torch_compat.dynamo import TorchDynamoException
from ringfx.units.argument import Argument, Code
from ringfx.units.format import format_bytes
from ringfx.watch.stages import preparing, stage_done

__all__ = ["Backend", "ringfx_backend"]

log = logging.getLogger("ringfx")
_CPU = torch.device("cpu")
LOUD = (NoteKind.GRAPH_BREAK, NoteKind.DENSE_MASK, NoteKind.NO_ATTENTION, NoteKind.WHOLE)
"""Notes that are warnings."""
OF_A_LENGTH = re.compile(r"\d[\d.,]* (?:B|[KMGT]iB)\b|\d[\d,]* long\b")
"""What differs where the same is said of another length of data."""
ONE_LENGTH = (
    "dynamic=True: a program is captured and compiled for each length, because its length is no "
    "symbol: the model computes with its length as a Python number, the graph breaks, or states "
    "are sharded"
)


class Backend:
    """Compiles every graph that Dynamo captures of one model."""

    def __init__(
        self,
        settings: Settings,
        world: World,
        mesh: Any = None,
        *,
        states: StateRanks = ONE_RANK,
    ) -> None:
        self.settings = settings
        self.world = world
        self.states = states
        self._mesh = mesh
        self.plans: list[Plan] = []
        self.ran: list[Plan] = []
        """Plans of the programs that the model's current or last call ran."""
        self.accumulation = Accumulation(world.group)
        self.handoff = ProgramHandoff(self.announce)
        self._model: weakref.ref[torch.nn.Module] | None = None
        self._is_part = False
        self._tracing_since: float | None = None
        """When Dynamo began, of a call's first program."""
        self.turns = Turns(settings.check_inputs)
        self.refusals = Refusals()
        self._announced: set[str] = set()
        self._runs_whole = False
        self._has_compared = False
        self.compilations = 0
        """Local programs that were handed to the compiler."""
        for_ringfx(self)
        prepare_tracing()

    @property
    def num_sites(self) -> int:
        return sum(len(plan.layers) for plan in self.plans)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        name = f"program {len(self.plans) + 1}"
        with preparing(name, rank=self.world.rank, since=self._tracing_since):
            if self._tracing_since is not None:
                stage_done("traced")
            made = self._made(gm, example_inputs)
            stage_done("compiled")
        self._tracing_since = None
        return made

    def _made(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        arrivals = {i: v._spec.arrival() for i, v in enumerate(example_inputs) if is_split(v)}
        if not arrivals and reads_gradients(gm):
            return compile_local_program(gm, list(example_inputs), self.settings.compiler)
        given, example_inputs = example_inputs, [global_example(v) for v in example_inputs]
        if (model := self._called()) is not None and is_outermost():
            name_arguments(gm, model.forward)
        _refuse_unusable(gm, example_inputs)
        name_groups(gm, self.world)
        parts = Parts.of(example_inputs, named_inputs(gm), self.world)
        if parts != NO_PARTS:
            example_inputs = example_parts(example_inputs)
        if not self.handoff.called:
            self._agree_on_profile(home_device(example_inputs))
        if not arrivals and self.states.ranks == 1 and parts == NO_PARTS:
            for_all_lengths = self._for_all_lengths(gm, example_inputs)
            if for_all_lengths is not None:
                return for_all_lengths
        if self.settings.dynamic:
            self.announce(ONE_LENGTH)
        lowered = lower_naming_internal_errors(
            gm, example_inputs, self.settings, self.world, arrivals, self.states
        )
        for i in lowered.arrived:
            example_inputs[i] = local_example(given[i])
        for i, rows in lowered.local.states.items():
            example_inputs[i] = example_of_part(example_inputs[i], rows, self.states.dtype)
        self.accept(lowered)
        placement = lowered.local.placement
        extra = line_inputs(placement.lines, self.world.rank, placement.device)
        compiled = self.compiled(lowered, lowered.local.graph_module, [*example_inputs, *extra])
        specs = {i: given[i]._spec for i in lowered.arrived}
        return Runner(lowered, compiled, extra, self, specs, parts)

    def compiled(
        self, lowered: Lowered, program: GraphModule, example_inputs: list[Any]
    ) -> Compiled:
        """The local program, or one that serves several lengths; counted."""
        self.compilations += 1
        log.info("compiles program %d of this model", self.compilations)
        compiler = self.settings.compiler
        with autocast_off():
            compile_bodies(lowered.local.bodies, compiler)
            if (by := observer()) is not None:
                return by.runs(lowered, self.world)
            return compile_local_program(program, example_inputs, compiler)

    def accept(self, lowered: Lowered) -> None:
        """Keep the plan of a program that will run, and say what a user should know."""
        self.plans.append(lowered.plan)
        self._announce(lowered)
        alone = lowered.captured.graph_break is None and is_outermost()
        if alone and len(self.plans) == 1 and not lowered.plan.has_tokens and not self._is_part:
            raise AttentionNotFound(no_attention_text(self.plans))

    def _for_all_lengths(self, gm: GraphModule, example_inputs: Sequence[Any]) -> ByLength | None:
        """Where Dynamo leaves lengths open: what runs the program at all of them."""
        program = OpenProgram.of(gm, example_inputs)
        if program is None or observer() is not None:
            return None

        def at(numbers: Mapping[str, int], given: Sequence[Any], settings: Settings) -> Lowered:
            return self._without_chunks(
                settings,
                lambda chosen: lower_naming_internal_errors(
                    program.text(), program.inputs_at(numbers, given), chosen, self.world, {}
                ),
            )

        first = at(program.traced, example_inputs, self.settings)
        lengths = lengths_in(program, first.captured, first.local.placement.lines)
        if not lengths or first.captured.graph_break or first.captured.uncompiled_caller:
            return None
        specialize(program, lengths)
        made = ByLength(self, program, lengths, at)
        given = program.inputs_at(program.traced, example_inputs)
        made.add(tuple(program.traced[name] for name in lengths), first, given)
        return made

    def _without_chunks(
        self, settings: Settings, lowered: Callable[[Settings], Lowered]
    ) -> Lowered:
        """A program without regions in chunks, where there is a choice: chunks are made for one
        length."""
        if settings.chunks != "auto":
            return lowered(settings)
        if not self._runs_whole:
            found = lowered(settings)
            if not found.plan.chunks:
                return found
            names = ", ".join(x.name or x.source for x in found.plan.chunks)
            self.announce(
                f"{names}: not run in chunks of tokens, so that one program serves all lengths; "
                "what is wide in it (a rank's logits, say) is held whole. Do: pass "
                f"{Argument('chunks', 1024)}, say, to have it in chunks, and a program for each "
                "length"
            )
            self._runs_whole = True
        try:
            return lowered(replace(settings, chunks="none"))
        except OutOfMemory:
            return lowered(settings)

    @property
    def is_running(self) -> bool:
        """Whether the model, or a part of it, is being called."""
        return self.handoff.running

    @contextlib.contextmanager
    def call(
        self,
        model: torch.nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        is_part: bool,
    ) -> Iterator[None]:
        """One call of the model: programs run inside; at its end it checks which ran.

        ``is_part``: it is a part of the model, and need not hold attention.

        Raises
        ------
        AttentionNotFound
            No program held any, so that the model ran whole.
        """
        self.ran.clear()
        self._tracing_since = time.perf_counter()
        self._model, self._is_part = weakref.ref(model), is_part
        self.turns.number += 1
        with shared_call(self.world.group):
            self._agree_on_profile(next((p.device for p in model.parameters()), _CPU))
            if self.settings.check_inputs and not self._has_compared:
                compare_shapes(self.world, model, args, kwargs)
                self._has_compared = True
            with self.refusals.watched(), self.handoff.call():
                yield
            self._look_at_what_ran(is_part)

    def _look_at_what_ran(self, is_part: bool) -> None:
        if not self.ran:
            self.announce(why_unsplit(self.refusals.texts))
        elif not is_part and not any(plan.has_tokens for plan in self.ran):
            raise AttentionNotFound(no_attention_text(self.ran))
        elif not is_part and (said := joined(self.ran).unsplit_words):
            self.announce(said)

    def plan_of_last_call(self) -> Plan:
        """One plan of all its programs, with what was moved between them."""
        if not self.ran:
            raise RingfxError(
                "the last call of this model ran no program that ringfx compiled; the log says "
                "why. Do: call it again, or use ringfx.plan(model, args, world_size=...)."
            )
        plan = joined(self.ran)
        return replace(plan, collectives=(*plan.collectives, *self.handoff.moved))

    def refuse_other_ranks(self) -> None:
        """Programs are made for the ranks that there were; a group may be made, or end, later.

        ``torch.compile(model, backend="ringfx")`` keeps them; ``optimize`` makes new ones.

        Raises
        ------
        AgreementError
            It names both sizes.
        """
        now = World.of(self._mesh)
        if now != self.world:
            raise AgreementError(
                f"this program was compiled for {self.world.size} rank(s) (rank {self.world.rank} "
                f"of group {self.world.group!r}), but now there are {now.size} (rank {now.rank} "
                f"of {now.group!r}). Do: call torch.distributed.init_process_group before the "
                "first call, or torch._dynamo.reset() after it; ringfx.optimize(model) compiles "
                "again by itself."
            )

    def evaluating(self) -> tuple[str, ...]:
        """The modules of the model in evaluation mode; none where the model is not known."""
        model = self._called()
        if model is None:
            return ()
        return tuple(name for name, part in model.named_modules() if not part.training)

    def _called(self) -> torch.nn.Module | None:
        return None if self._model is None else self._model()

    def _agree_on_profile(self, device: torch.device) -> None:
        """Once, before the ranks compile their first program: all of them choose alike."""
        if self.world.size > 1 and not isinstance(self.settings.profile, Profile):
            name, world = self.settings.profile, self.world
            profile = agreed_profile(name, device=device.type, world=world)
            self.settings = replace(self.settings, profile=profile)

    def _announce(self, lowered: Lowered) -> None:
        """Say once, on every rank, what a user should know: graph breaks, gathers, doubts."""
        notes = lowered.plan.notes
        loud = texts_of(notes, *LOUD)
        loud += [
            f"{x.name} ({x.source}): this looks like attention but was not recognised; it runs "
            "unsharded on every rank"
            for x in lowered.plan.missed
        ]
        loud += [
            f"{x.name} ({x.source}): its attention is replicated on every rank, {x.reason}. Do: "
            f"pass {Argument('strict', True)} to refuse this"
            for x in lowered.plan.replicated_layers
        ]
        loud += spread_tokens(lowered)
        loud += [_gather_text(m) for m in lowered.plan.collectives if m.kind.gathers]
        self.announce(*loud)
        self._say(logging.INFO, [note.text for note in notes])
        log.debug("%s", lowered.plan)

    def announce(self, *texts: str) -> None:
        """Warn of each once."""
        self._say(logging.WARNING, texts)

    def _say(self, level: int, texts: Sequence[str]) -> None:
        """Each once, and not again for every length of data."""
        said = {text: OF_A_LENGTH.sub("", text) for text in texts}
        for text, words in said.items():
            if words not in self._announced:
                log.log(level, text)
        self._announced |= {*said.values()}


def lower_naming_internal_errors(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    world: World,
    arrivals: Mapping[int, Arrival],
    states: StateRanks = ONE_RANK,
) -> Lowered:
    """``lower``; what goes wrong inside it and has no name of its own gets one."""
    try:
        with without_saved_tensor_hooks():
            return lower(gm, example_inputs, settings, world, arrivals, states)
    except (RingfxError, TorchDynamoException):
        raise
    except Exception as error:  # whatever a defect of ours raises: it is raised again, as its cause
        frames = traceback.extract_tb(error.__traceback__)
        where = next((f for f in reversed(frames) if "ringfx" in f.filename), frames[-1])
        said = (str(error).strip() or "no text").splitlines()[0]
        raise VerificationError(
            f"ringfx could not rewrite this program: {type(error).__name__} ({said}) in "
            f"{where.name}, {Path(where.filename).name}:{where.lineno}. This is a defect of "
            "ringfx, not of the model. Do: run the model without ringfx, and please report the "
            "defect with the model; the original error is attached as the cause."
        ) from error


def _refuse_unusable(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Inputs that have no values."""
    for name, value in zip(named_inputs(gm), inputs, strict=False):
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            raise InvalidArgument(
                f"{name} {tuple(value.shape)} is on the meta device: it has a shape "
                "but no values. Do: to plan, call ringfx.plan(model, ...), which accepts meta "
                "tensors; to run, make the model (to_empty, load_state_dict) and the inputs on a "
                "real device."
            )


def no_attention_text(plans: Sequence[Plan]) -> str:
    declined = [d for plan in plans for d in (*plan.declined, *plan.missed)]
    near = "".join(f"\n  {d.name} ({d.source}): {d.reason}" for d in declined[:8])
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    broken = "".join(f"\n  {text}" for text in texts_of(notes, NoteKind.GRAPH_BREAK))
    return (
        "no attention over a sequence was found in this model, so ringfx has nothing to split. "
        + (f"Attention-like regions not parallelized:{near}\n" if near else "")
        + (f"A graph break may keep attention outside the compiler:{broken}\n" if broken else "")
        + "".join(f"{x[0].upper()}{x[1:]}\n" for x in texts_of(notes, NoteKind.NO_VALUES))
        + (
            "Ringfx recognises scaled_dot_product_attention and its kernels, "
            "nn.MultiheadAttention, flex_attention, flash-attn, xformers, and softmax(q k^T) v "
            "over tokens in any form. A model without attention is split along an axis of its "
            "inputs that convolutions, pools, scans or Fourier transforms run along, or that is "
            "neither the batch nor the features: no input has such an axis of at least 4 elements "
            "and one a rank, or it is an input of a program that ends in a graph break. Do: say "
            "which dimension of an input holds the tokens, "
            f"{Argument('token_dims', Code(str({'x': 1}), 'x=1'))}, run `ringfx explain MODEL` to "
            "see which operators were examined and why they were rejected, or run the model "
            "without ringfx."
        )
    )


def _gather_text(move: Collective) -> str:
    size = format_bytes(move.bytes_moved)
    where = ", ".join(x for x in (move.name, move.source) if x)
    what = "for a gradient in backward" if move.in_backward else f"for {move.reason}"
    return f"{where}: gathers {size} on every rank {what}"


def ringfx_backend(gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
    """Entry point of ``torch.compile(model, backend="ringfx", options={...})``."""
    options = dict(kwargs.get("options") or {})
    mesh = options.pop("mesh", None)
    settings = Settings.of(options)
    if settings.dynamic:
        raise InvalidArgument(
            "torch.compile(backend='ringfx') has the option dynamic itself. Do: use "
            "torch.compile(model, backend='ringfx', dynamic=True)."
        )
    if settings.shard_states is not False:
        raise InvalidArgument(
            "torch.compile(backend='ringfx') cannot shard states: it does not hold the model. Do: "
            "use ringfx.optimize(model, shard_states=True)."
        )
    backend = Backend(settings, World.of(mesh), mesh)
    with shared_call(backend.world.group, begins=False):
        return backend(gm, example_inputs)


for_ringfx(ringfx_backend)
prepare_tracing()  # Dynamo looks this backend up by name before it traces
