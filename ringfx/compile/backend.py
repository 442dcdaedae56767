"""The Dynamo backend: plan and rewrite a graph, and hand it to a compiler."""

from __future__ import annotations

import contextlib
import logging
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from ringfx.comm.grad_accumulation import Accumulation
from ringfx.comm.state_ranks import ONE_RANK, StateRanks
from ringfx.comm.world import World
from ringfx.compile.compilers import Compiled, compile_bodies, compile_local_program
from ringfx.compile.dynamo import for_ringfx, prepare_tracing
from ringfx.compile.fully_sharded import is_dtensor
from ringfx.compile.pipeline import Lowered, lower
from ringfx.compile.rank_agreement import Turns
from ringfx.compile.runner import Runner
from ringfx.compile.settings import Settings
from ringfx.compile.states import example_of_part
from ringfx.compile.why_unsplit import Refusals, why_unsplit
from ringfx.cost_model import Profile
from ringfx.cost_model.calibration.shared_profile import agreed_profile
from ringfx.errors import (
    AgreementError,
    AttentionNotFound,
    InvalidArgument,
    RingfxError,
    VerificationError,
)
from ringfx.failures.channel import shared_call
from ringfx.ir.note import NoteKind, texts_of
from ringfx.ir.plan import Plan, joined
from ringfx.ir.values import Arrival, Collective
from ringfx.passes.capture.breaks import is_outermost, reads_gradients
from ringfx.passes.capture.precision import autocast_off
from ringfx.passes.capture.trace import input_name
from ringfx.passes.place.min_cut import home_device
from ringfx.passes.verify.check import line_inputs
from ringfx.split_tensor.handoff import ProgramHandoff, global_example, is_split, local_example
from ringfx.torch_compat.autograd import without_saved_tensor_hooks
from ringfx.torch_compat.dynamo import TorchDynamoException
from ringfx.units.format import format_bytes

__all__ = ["Backend", "ringfx_backend"]

log = logging.getLogger("ringfx")
_CPU = torch.device("cpu")


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
        self.turns = Turns(settings.check_inputs)
        self.refusals = Refusals()
        self._announced: set[str] = set()
        for_ringfx(self)
        prepare_tracing()

    @property
    def num_sites(self) -> int:
        return sum(len(plan.layers) for plan in self.plans)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        arrivals = {i: v._spec.arrival() for i, v in enumerate(example_inputs) if is_split(v)}
        if not arrivals and reads_gradients(gm):
            return compile_local_program(gm, list(example_inputs), self.settings.compiler)
        given, example_inputs = example_inputs, [global_example(v) for v in example_inputs]
        _refuse_unusable(gm, example_inputs)
        if not self.handoff.called:
            self._agree_on_profile(home_device(example_inputs))
        lowered = lower_naming_internal_errors(
            gm, example_inputs, self.settings, self.world, arrivals, self.states
        )
        for i in lowered.arrived:
            example_inputs[i] = local_example(given[i])
        for i, rows in lowered.local.states.items():
            example_inputs[i] = example_of_part(example_inputs[i], rows, self.states.dtype)
        self.plans.append(lowered.plan)
        self._announce(lowered)
        alone = lowered.captured.graph_break is None and is_outermost()
        if alone and len(self.plans) == 1 and not self.num_sites and not self._is_part:
            raise AttentionNotFound(no_attention_text(self.plans))
        placement = lowered.local.placement
        extra = line_inputs(placement.lines, self.world.rank, placement.device)
        with autocast_off():
            compile_bodies(lowered.local.bodies, self.settings.compiler)
            compiled = compile_local_program(
                lowered.local.graph_module, [*example_inputs, *extra], self.settings.compiler
            )
        specs = {i: given[i]._spec for i in lowered.arrived}
        return Runner(lowered, compiled, extra, self, specs)

    @property
    def is_running(self) -> bool:
        """Whether the model, or a part of it, is being called."""
        return self.handoff.running

    @contextlib.contextmanager
    def call(self, model: torch.nn.Module, *, is_part: bool) -> Iterator[None]:
        """One call of the model: programs run inside; at its end it checks which ran.

        ``is_part``: it is a part of the model, and need not hold attention.

        Raises
        ------
        AttentionNotFound
            No program held any, so that the model ran whole.
        """
        self.ran.clear()
        self._model, self._is_part = weakref.ref(model), is_part
        self.turns.number += 1
        with shared_call(self.world.group):
            self._agree_on_profile(next((p.device for p in model.parameters()), _CPU))
            with self.refusals.watched(), self.handoff.call():
                yield
            self._look_at_what_ran(is_part)

    def _look_at_what_ran(self, is_part: bool) -> None:
        if not self.ran:
            self.announce(why_unsplit(self.refusals.texts))
        elif not is_part and not any(plan.layers for plan in self.ran):
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
        model = None if self._model is None else self._model()
        if model is None:
            return ()
        return tuple(name for name, part in model.named_modules() if not part.training)

    def _agree_on_profile(self, device: torch.device) -> None:
        """Once, before the ranks compile their first program: all of them choose alike."""
        if self.world.size > 1 and not isinstance(self.settings.profile, Profile):
            name, world = self.settings.profile, self.world
            profile = agreed_profile(name, device=device.type, world=world)
            self.settings = replace(self.settings, profile=profile)

    def _announce(self, lowered: Lowered) -> None:
        """Say once, on every rank, what a user should know: graph breaks, gathers, doubts."""
        notes = lowered.plan.notes
        loud = texts_of(notes, NoteKind.GRAPH_BREAK, NoteKind.DENSE_MASK)
        loud += [
            f"{x.name} ({x.source}): this looks like attention but was not recognised; it runs "
            "unsharded on every rank"
            for x in lowered.plan.missed
        ]
        loud += [
            f"{x.name} ({x.source}): its attention is replicated on every rank, {x.reason}. Do: "
            "pass strict=True to refuse this"
            for x in lowered.plan.replicated_layers
        ]
        loud += [_gather_text(m) for m in lowered.plan.collectives if m.kind.gathers]
        self.announce(*loud)
        for note in notes:
            if note.text not in self._announced:
                log.info(note.text)
        self._announced |= {note.text for note in notes}

    def announce(self, *texts: str) -> None:
        """Warn of each once."""
        for text in texts:
            if text not in self._announced:
                log.warning(text)
        self._announced |= {*texts}


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
    """Inputs that have no values, or are spread over ranks by something else."""
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=False):
        if is_dtensor(value):
            raise InvalidArgument(
                f"{input_name(node)} {tuple(value.shape)} is a DTensor on {value.device_mesh} "
                "(from parallelize_module, tensor parallelism), but ringfx traces plain tensors "
                "only. Do: do not apply parallelize_module to modules that ringfx.optimize is "
                "given; fully_shard (FSDP2) works, before or after."
            )
        if isinstance(value, torch.Tensor) and value.device.type == "meta":
            raise InvalidArgument(
                f"{input_name(node)} {tuple(value.shape)} is on the meta device: it has a shape "
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
            "over tokens in any form. Layers that mix tokens in another way (convolutions, "
            "Fourier transforms, recurrences) contain no attention. Do: run `ringfx explain "
            "MODEL` to see which operators were examined and why they were rejected, or run the "
            "model without ringfx."
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
