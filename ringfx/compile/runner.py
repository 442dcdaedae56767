"""One compiled program on one rank: its inputs, what is checked, and what its results become."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ringfx.comm.conjugate import identity_grad_all_reduce
from ringfx.comm.double_backward import refuse_in_compiled
from ringfx.comm.stats import snapshot
from ringfx.comm.world import World
from ringfx.compile.compilers import Compiled
from ringfx.compile.mask_buffer_guard import (
    BufferSnapshot,
    buffers_to_watch,
    refuse_changed_buffers,
)
from ringfx.compile.pipeline import Lowered
from ringfx.compile.rank_agreement import Agreement
from ringfx.compile.states import part_of_state
from ringfx.compile.tensor_parallel import NO_PARTS, Parts
from ringfx.failures.channel import shared_call
from ringfx.ir.plan import LayerPlan, Plan
from ringfx.ops.chunked import body_of
from ringfx.ops.kernels.kernel import why_not
from ringfx.passes.capture.precision import autocast_off
from ringfx.passes.rewrite import DeferredOutput, SplitOutput
from ringfx.split_tensor.autograd import wrap_all, wrap_deferred
from ringfx.split_tensor.sharded_states import STATE_OF
from ringfx.split_tensor.spec import SplitSpec
from ringfx.strategies import Strategy, planned_with

if TYPE_CHECKING:
    from ringfx.compile.backend import Backend

__all__ = ["Runner", "other_kernels"]

log = logging.getLogger("ringfx")


class Runner:
    """Checks agreement, runs the program, and wraps what stays split."""

    def __init__(
        self,
        lowered: Lowered,
        compiled: Compiled,
        extra: Sequence[torch.Tensor],
        backend: Backend,
        arrived: Mapping[int, SplitSpec],
        parts: Parts = NO_PARTS,
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
        self._parts = parts
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
            rows = {self._names[i]: getattr(inputs[i], STATE_OF) for i in self._states}
            self._agreement.check(whole, unchanged, rows)
        if self._extra:
            self._extra[-1] = torch.full(
                (), self._accumulation.call(self._parts.owners(inputs, taken))
            )
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
        value = self._parts.take(index, value)
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
    strategy = planned_with(strategies).get(layer.strategy)  # none: replicated or local
    all_keys = strategy is not None and strategy.all_keys
    whys = why_not(
        layer.kernel, torch.device(site.device), getattr(torch, site.dtype),
        all_keys=all_keys, head_dim=max(site.head_dim, site.v_head_dim),
    )  # fmt: skip
    return f" ({'; '.join(whys)})" if whys else ""


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
