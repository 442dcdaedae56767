"""Regions of the local program become calls that run in chunks of the rank's tokens."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from ringfx.comm import conjugate
from ringfx.ops.chunked import Body, registered
from ringfx.passes.capture.gradients import stamp_gradients
from ringfx.passes.chunks.body import HELPERS, CannotChunk, body_of_nodes, places_of_one_rank
from ringfx.passes.chunks.sizes import Sized
from ringfx.passes.rewrite import DeferredOutput, LocalProgram, SplitOutput
from ringfx.torch_compat.operators import OpOverload

__all__ = ["run_in_chunks"]

log = logging.getLogger("ringfx")


def run_in_chunks(
    local: LocalProgram, regions: Sequence[Sized], inputs_need: Sequence[bool]
) -> tuple[LocalProgram, tuple[Sized, ...]]:
    """The program with its regions as calls; and those regions for which it was possible.

    Parameters
    ----------
    local
        A verified program: its nodes know their values. Its graph is changed.
    inputs_need
        For each of the user's inputs whether it needs a gradient.
    """
    if not regions:
        return local, ()
    gm = local.graph_module
    given = gm.graph.find_nodes(op="placeholder")
    stamp_gradients(gm.graph, [*inputs_need, *[False] * (len(given) - len(inputs_need))])
    if not local.group:
        local = replace(local, tokens=places_of_one_rank(local))
    erased: set[Node] = set()
    bodies: dict[str, tuple[str, ...]] = {}
    done: list[Sized] = []
    outputs = list(local.outputs)
    for region in regions:
        found = _LocalRegion(local, region, outputs)
        try:
            key, what = found.replaced()
        except CannotChunk as reason:
            log.info("%s does not run in chunks: %s", region.region.name, reason)
            continue
        bodies[key] = what
        erased |= found.nodes
        done.append(region)
    gm.graph.lint()
    gm.recompile()
    values = {value: made for value, made in local.values.items() if made not in erased}
    made = replace(local, values=values, bodies=bodies, outputs=tuple(outputs))
    return made, tuple(done)


def _input_of(operand: Node) -> Node | None:
    """The input of the program that an operand is, whatever is done with its gradient."""
    if operand.op == "placeholder":
        return operand
    if operand.target is conjugate.identity_grad_all_reduce:
        source = operand.args[0]
        return source if isinstance(source, Node) and source.op == "placeholder" else None
    found: Node | None = operand.meta.get("ringfx_input_node")
    return found


class _LocalRegion:
    """One region, and the calls of the local program that compute it."""

    def __init__(
        self, local: LocalProgram, sized: Sized, outputs: list[SplitOutput | None]
    ) -> None:
        self.local, self.sized, self.outputs = local, sized, outputs
        self.graph: Graph = local.graph_module.graph
        self.order = {n: i for i, n in enumerate(self.graph.nodes)}
        region = sized.region
        made = [local.values[n] for n in region.nodes if n in local.values]
        self.leaving = [local.partials.get(n) or local.values[n] for n in region.leaving]
        sums = [n for n in self.leaving if n not in local.tokens]
        after_sums = self._reached(sums, lambda n: n.users)
        own = {n for n in (*made, *self.leaving) if n not in after_sums}
        self.nodes = own | self._between(own)

    def replaced(self) -> tuple[str, tuple[str, ...]]:
        """Put one call in its place; its body's key, and which programs of it are run."""
        region = self.sized.region
        for node in self.nodes:
            if not isinstance(node.target, OpOverload) and node.target not in HELPERS:
                raise CannotChunk(f"{node.target} stands between its calls")
        nodes = self._sorted()
        read = dict.fromkeys(i for n in nodes for i in n.all_input_nodes)
        entering = [i for i in read if i not in self.nodes]
        body = body_of_nodes(self.local, nodes, entering, self.leaving, self.sized)
        key = registered(body)
        is_loss = region.is_loss and bool(body.wanted)
        operator_of = torch.ops.ringfx.chunked_loss if is_loss else torch.ops.ringfx.chunked
        place = self._place(entering)
        deferred = [self._deferred(value) for value in region.returned]
        with self.graph.inserting_before(place):
            call = self.graph.call_function(operator_of.default, (entering, key))
            items = [
                self.graph.call_function(operator.getitem, (call, i))
                for i in range(len(self.leaving))
            ]
        call.meta = dict(self.leaving[0].meta) | {"ringfx_path": region.name}
        call.meta["val"] = [n.meta["val"] for n in self.leaving]
        for value, item in zip(self.leaving, items, strict=True):
            item.meta = dict(value.meta)
            value.replace_all_uses_with(item, delete_user_cb=lambda n: n not in self.nodes)
        for value, output in zip(region.returned, deferred, strict=True):
            self._return_later(self.local.values[value], output)
        for node in reversed(self._sorted()):
            self.graph.erase_node(node)
        if is_loss:
            return key, ("loss",)
        return key, ("forward", "backward") if body.wanted else ("forward",)

    def _deferred(self, value: Node) -> tuple[Body, Sequence[Node]]:
        """A value that the program returns, as a program of what is there at its end."""
        made = self.local.values[value]
        nodes = self._reached([made], lambda n: n.all_input_nodes) & self.nodes | {made}
        ordered = sorted(nodes, key=self.order.__getitem__)
        read = dict.fromkeys(i for n in ordered for i in n.all_input_nodes if i not in nodes)
        for operand in read:
            if operand.op == "placeholder" and operand in self.local.tokens:
                raise CannotChunk(f"{value.name} is returned and reads a split input")
        return body_of_nodes(self.local, ordered, [*read], [made], self.sized), [*read]

    def _return_later(self, made: Node, deferred: tuple[Body, Sequence[Node]]) -> None:
        """The program gives None, and the operands as further results."""
        body, operands = deferred
        output = self.graph.output_node()
        results: list[object] = list(output.args[0])  # type: ignore[arg-type]
        given = self.graph.find_nodes(op="placeholder")
        inputs: dict[int, int] = {}
        further: dict[int, int] = {}
        for i, operand in enumerate(operands):
            source = _input_of(operand)
            if source is not None:
                inputs[i] = given.index(source)
                continue
            if operand not in results[len(self.outputs) :]:
                results.append(operand)
            further[i] = results.index(operand, len(self.outputs))
        for number, result in enumerate(results[: len(self.outputs)]):
            split = self.outputs[number]
            if result is made and split is not None:
                results[number] = None
                self.outputs[number] = DeferredOutput(
                    token_dim=split.token_dim, shape=split.shape, body=registered(body),
                    inputs=inputs, results=further,
                )  # fmt: skip
        output.args = (tuple(results),)  # type: ignore[arg-type]

    def _place(self, entering: Iterable[Node]) -> Node:
        """The first call that reads what leaves, which comes after all that enters."""
        users = [u for n in self.leaving for u in n.users if u not in self.nodes]
        first = min(users, key=self.order.__getitem__)
        if any(self.order[n] > self.order[first] for n in entering):
            raise CannotChunk("it is read before all that it reads is there")
        return first

    def _sorted(self) -> list[Node]:
        return sorted(self.nodes, key=self.order.__getitem__)

    def _between(self, nodes: set[Node]) -> set[Node]:
        """Calls of the rank alone that stand between these: padding that is masked, casts."""
        after = self._reached(nodes, lambda n: n.users)
        before = self._reached(nodes, lambda n: n.all_input_nodes)
        return (after & before) - nodes

    def _reached(self, nodes: Iterable[Node], step: object) -> set[Node]:
        found: set[Node] = set()
        todo = list(nodes)
        while todo:
            for n in step(todo.pop()):  # type: ignore[operator]
                if n not in found and n.op == "call_function":
                    found.add(n)
                    todo.append(n)
        return found
