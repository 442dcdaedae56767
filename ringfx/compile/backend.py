"""The Dynamo backend: plan and rewrite a graph, hand it to a compiler, run it on this rank."""

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

from ringfx.comm.conjugate import identity_grad_all_reduce
from ringfx.comm.double_backward import refuse_in_compiled
from ringfx.comm.grad_accumulation import Accumulation
from ringfx.comm.stats import snapshot
from ringfx.comm.world import World
from ringfx.compile.compilers import Compiled, compile_bodies, compile_local_program
from ringfx.compile.dynamo import for_ringfx, prepare_tracing
from ringfx.compile.fully_sharded import is_dtensor
from ringfx.compile.mask_buffer_guard import (
    BufferSnapshot,
    buffers_to_watch,
    refuse_changed_buffers,
)
from ringfx.compile.pipeline import Lowered, lower
from ringfx.compile.rank_agreement import Agreement, Turns
from ringfx.compile.settings import Settings
from ringfx.compile.states import example_of_part, part_of_state
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
from ringfx.ir.plan import LayerPlan, Plan, joined
from ringfx.ir.values import Arrival, Collective
from ringfx.ops.chunked import body_of
from ringfx.ops.kernels.kernel import why_not
from ringfx.passes.capture.breaks import is_outermost, reads_gradients
from ringfx.passes.capture.precision import autocast_off
from ringfx.passes.capture.trace import input_name
from ringfx.passes.place.min_cut import home_device
from ringfx.passes.rewrite import DeferredOutput, SplitOutput
from ringfx.passes.verify.check import line_inputs
from ringfx.split_tensor.autograd import wrap_all, wrap_deferred
from ringfx.split_tensor.handoff import ProgramHandoff, global_example, is_split, local_example
from ringfx.split_tensor.spec import SplitSpec
from ringfx.strategies import Strategy
from ringfx.torch_compat.autograd import without_saved_tensor_hooks
from ringfx.torch_compat.dynamo import TorchDynamoException
from ringfx.units.format import format_bytes

__all__ = ["Backend", "ringfx_backend"]

log = logging.getLogger("ringfx")
_CPU = torch.device("cpu")


class Backend:
    """Compiles every graph that Dynamo captures of one model."""

    def __init__(self, settings: Settings, world: World, mesh: Any = None) -> None:
        self.settings = settings
        self.world = world
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
            gm, example_inputs, self.settings, self.world, arrivals
        )
        for i in lowered.arrived:
            example_inputs[i] = local_example(given[i])
        for i, rows in lowered.local.states.items():
            example_inputs[i] = example_of_part(example_inputs[i], rows)
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


class Runner:
    """One compiled program on one rank: checks agreement, runs, wraps what stays split."""

    def __init__(
        self,
        lowered: Lowered,
        compiled: Compiled,
        extra: Sequence[torch.Tensor],
        backend: Backend,
        arrived: Mapping[int, SplitSpec],
    ) -> None:
        settings, world = backend.settings, backend.world
        self._compiled = compiled
        self._plan, self._strategies = lowered.plan, settings.strategies
        self._compared = False
        self._group, self._turns = world.group, backend.turns
        self._ran = backend.ran
        self._refuse_other_ranks = backend.refuse_other_ranks
        self._extra = list(extra)
        self._accumulation = backend.accumulation
        self._writes = lowered.captured.writes
        self._returned = lowered.captured.returned
        self._arrived = arrived
        self._states = lowered.local.states
        self._handoff = backend.handoff
        self._broken = lowered.captured.graph_break or lowered.captured.uncompiled_caller
        self._outputs_form = settings.outputs
        self._names, self._held = lowered.captured.input_names, lowered.held
        self._buffers = BufferSnapshot(buffers_to_watch(lowered.captured, lowered.held))
        self._outputs = lowered.local.outputs
        specs = [
            None if output is None else _spec(output, lowered, world, i)
            for i, output in enumerate(self._outputs)
        ]
        is_deferred = [isinstance(output, DeferredOutput) for output in self._outputs]
        self._specs = [None if x else s for s, x in zip(specs, is_deferred, strict=True)]
        self._deferred_specs = specs
        self._agreement = (
            Agreement(
                world,
                lowered.digest,
                self._names,
                _summary(lowered.plan),
                _generators(lowered),
                evaluating=backend.evaluating,
                turns=backend.turns,
                buffers=lowered.captured.buffers,
            )
            if settings.check_inputs
            else None
        )

    def __call__(self, *inputs: Any) -> list[Any]:
        with autocast_off():
            return self._call(inputs)

    def _call(self, inputs: Sequence[Any]) -> list[Any]:
        self._ran.append(self._plan)
        if self._handoff.called:
            return self._run(inputs)
        self._refuse_other_ranks()
        self._turns.number += 1
        with shared_call(self._group):
            return self._run(inputs)

    def _run(self, inputs: Sequence[Any]) -> list[Any]:
        taken = [self._take(i, v) for i, v in enumerate(inputs)]
        unchanged = self._buffers.unchanged(taken)
        refuse_changed_buffers(self._names, self._held, unchanged)
        if self._agreement is not None:
            parts = self._arrived.keys() | self._states.keys()
            whole = [None if i in parts else x for i, x in enumerate(taken)]
            self._agreement.check(whole, unchanged)
        if self._extra:
            self._extra[-1] = torch.full((), self._accumulation.call(taken))
        results = self._compiled(*self._kept(taken), *self._extra)
        refuse_in_compiled(results)
        if not self._compared:
            self._compared = True
            for text in other_kernels(self._plan, self._strategies):
                log.warning(text)
        finished = self._finish(results, taken)
        return self._write(inputs, finished)

    def _take(self, index: int, value: Any) -> Any:
        """An input as the program was made for it: this rank's part, or the whole."""
        if index in self._states:
            return part_of_state(value, self._states[index])
        spec = self._arrived.get(index)
        if spec is None:
            return self._handoff.whole(value)
        return self._handoff.part(value, spec)

    def _kept(self, inputs: Sequence[Any]) -> list[Any]:
        """The inputs, and copies of those that are written later: backward may need the old."""
        if not torch.is_grad_enabled():
            return list(inputs)
        return [x.clone() if i in self._writes else x for i, x in enumerate(inputs)]

    def _write(self, inputs: Sequence[Any], results: list[Any]) -> list[Any]:
        """Copy new values into the user's tensors, and return those where the user does."""
        given = len(results) - len(self._writes)
        for i, value in zip(self._writes, results[given:], strict=True):
            inputs[i].copy_(value)
        return [
            inputs[self._returned[i]] if i in self._returned else result
            for i, result in enumerate(results[:given])
        ]

    def _finish(self, results: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The results as the user gets them; what follows the outputs is for deferred ones."""
        outputs = self._outputs
        further, results = results, results[: len(outputs)]
        if self._outputs_form == "local" and self._broken is None:
            for result, spec in zip(results, self._specs, strict=True):
                if spec is not None:
                    result.ringfx_positions = spec.layout.positions(spec.rank) - spec.offset
            return list(results)
        on_gather = self._handoff.on_gather(self._broken)
        finished = wrap_all(results, self._specs, on_gather)
        for i, output in enumerate(outputs):
            if isinstance(output, DeferredOutput):
                operands = self._operands(output, further, inputs)
                spec = self._deferred_specs[i]
                assert spec is not None, "an output that is deferred is split"
                finished[i] = wrap_deferred(body_of(output.body), operands, spec, on_gather)
        return finished

    def _operands(
        self, output: DeferredOutput, results: Sequence[Any], inputs: Sequence[Any]
    ) -> list[torch.Tensor]:
        """What a deferred output is computed from; of inputs each rank's gradient is a part."""
        body = body_of(output.body)
        found = {i: results[number] for i, number in output.results.items()}
        for i, number in output.inputs.items():
            value = inputs[number]
            what = f"{self._names[number]}, which a deferred output reads"
            found[i] = (
                identity_grad_all_reduce(value, self._group, what) if i in body.wanted else value
            )
        return [found[i] for i in range(len(found))]


def lower_naming_internal_errors(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    world: World,
    arrivals: Mapping[int, Arrival],
) -> Lowered:
    """``lower``; what goes wrong inside it and has no name of its own gets one."""
    try:
        with without_saved_tensor_hooks():
            return lower(gm, example_inputs, settings, world, arrivals)
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


def other_kernels(plan: Plan, strategies: Mapping[str, Strategy]) -> list[str]:
    """What to say where a layer ran another kernel than the plan's times were made for."""
    stats = snapshot()
    pairs = [(layer, stats[layer.name].ran) for layer in plan.layers if layer.name in stats]
    others = [(x, ran[x.kernel]) for x, ran in pairs if ran.get(x.kernel, x.kernel) != x.kernel]
    return [
        f"{layer.name}: the plan expects the {layer.kernel} kernel, but {ran} ran"
        f"{_refused(layer, strategies)}; the predicted times do not hold. Do: run `ringfx "
        "calibrate` on this machine."
        for layer, ran in others
    ]


def _refused(layer: LayerPlan, strategies: Mapping[str, Strategy]) -> str:
    """Why the planned kernel cannot run on this machine's card, in brackets."""
    site = layer.site
    all_keys = not layer.is_replicated and strategies[layer.strategy].all_keys
    whys = why_not(
        layer.kernel, torch.device(site.device), getattr(torch, site.dtype),
        all_keys=all_keys, head_dim=max(site.head_dim, site.v_head_dim),
    )  # fmt: skip
    return f" ({'; '.join(whys)})" if whys else ""


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


def _generators(lowered: Lowered) -> list[torch.device]:
    """Devices that the program draws random numbers on."""
    drawing = (
        n.meta["val"].device
        for n in lowered.captured.graph_module.graph.nodes
        if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())
        and isinstance(n.meta.get("val"), torch.Tensor)
    )
    return list(dict.fromkeys(drawing))


def _spec(output: SplitOutput, lowered: Lowered, world: World, index: int) -> SplitSpec:
    lines = lowered.local.placement.lines
    return SplitSpec.of(
        lines.arrival(output.token_dim),
        name=_output_name(lowered, index),
        shape=output.shape,
        rank=world.rank,
        group=world.group,
    )


def _output_name(lowered: Lowered, index: int) -> str:
    """``output 2 (lm_head, model.py:61)``."""
    nodes = lowered.captured.graph_module.graph.output_node().args[0]
    meta = nodes[index].meta  # type: ignore[index, union-attr]
    where = ", ".join(x for x in (meta.get("ringfx_path"), meta.get("ringfx_source")) if x)
    return f"output {index}" + (f" ({where})" if where else "")


def _summary(plan: Plan) -> str:
    chosen = ", ".join(f"{layer.name}={layer.strategy}" for layer in plan.layers[:4])
    axes = ", ".join(f"{a.axis} {a.length} {a.layout}" for a in plan.axes)
    return f"{len(plan.layers)} attentions ({chosen}), {axes}, digest {plan.digest()}"


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
    if settings.shard_states:
        raise InvalidArgument(
            "torch.compile(backend='ringfx') cannot shard states: it does not hold the model. Do: "
            "use ringfx.optimize(model, shard_states=True)."
        )
    backend = Backend(settings, World.of(mesh), mesh)
    with shared_call(backend.world.group, begins=False):
        return backend(gm, example_inputs)


for_ringfx(ringfx_backend)
prepare_tracing()  # Dynamo looks this backend up by name before it traces
