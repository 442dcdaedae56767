"""The global program with each region as one call: what the memory of a step is counted on."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ringfx.ir.values import Captured
from ringfx.passes.capture.gradients import needs_grad
from ringfx.passes.chunks.products import SUMMED_IN_PLACE
from ringfx.passes.chunks.sizes import Sized

__all__ = ["ChunkedCall", "Outlined", "outlined", "region_in_chunks"]


@dataclass(frozen=True, kw_only=True)
class ChunkedCall:
    """What a region in chunks holds while it runs, and for its backward."""

    wide: int
    """Bytes of one chunk's wide values."""
    trains: bool
    """Whether their gradients, as wide, are computed too."""
    sums: int
    """Bytes of a chunk's part of gradients that are sums."""
    is_loss: bool
    """Whether its gradients are computed with it, and kept in place of its operands."""

    def bytes(self, *, in_place: bool) -> int:
        """Of one chunk. ``in_place``: Inductor writes a loss's gradient over its wide values."""
        gradients = self.trains and not (in_place and self.is_loss)
        return self.wide * (2 if gradients else 1) + self.sums


@dataclass(frozen=True, eq=False, kw_only=True)
class Outlined:
    """A copy of the captured program, with regions as calls."""

    captured: Captured
    original: Mapping[Node, Node]
    """Node of the copy -> of the captured program; calls of regions have none."""
    regions: Mapping[Node, tuple[Node, ...]]
    """Call of a region -> its nodes of the captured program."""

    def originals(self, node: Node) -> tuple[Node, ...]:
        """The nodes of the captured program that one of the copy stands for."""
        if node in self.regions:
            return self.regions[node]
        found = self.original.get(node)
        return () if found is None else (found,)

    def of_original(self, ask: Callable[[Node], Any], other: Any) -> Callable[[Node], Any]:
        """A question about nodes of the captured program, asked about the copy's."""

        def asked(node: Node) -> Any:
            found = self.original.get(node)
            return other if found is None else ask(found)

        return asked


def region_in_chunks(*operands: Any) -> Any:
    """Stands for a region; it never runs."""
    raise NotImplementedError


def outlined(captured: Captured, regions: Sequence[Sized]) -> Outlined:
    """The copy. Of values that are deferred the copy returns the operands."""
    return _Outliner(captured, regions).run()


class _Outliner:
    def __init__(self, captured: Captured, regions: Sequence[Sized]) -> None:
        self.captured = captured
        self.graph = Graph()
        self.made: dict[Node, Node] = {}
        self.region_of = {n: x for x in regions for n in x.region.nodes}
        self.original: dict[Node, Node] = {}
        self.regions: dict[Node, tuple[Node, ...]] = {}

    def run(self) -> Outlined:
        for node in self.captured.graph_module.graph.nodes:
            if node in self.region_of:
                continue
            if node.op == "output":
                results = [x for value in node.args[0] for x in self._returned(value)]
                self.graph.output(tuple(torch.fx.node.map_arg(results, self._of)))
                continue
            self.made[node] = self.graph.node_copy(node, self._of)
            self.original[self.made[node]] = node
        module = GraphModule(self.captured.graph_module, self.graph, "RingfxOutlined")
        captured = replace(self.captured, graph_module=module)
        return Outlined(captured=captured, original=self.original, regions=self.regions)

    def _of(self, value: Node) -> Node:
        if value not in self.made:
            self._call(self.region_of[value])
        return self.made[value]

    def _returned(self, value: Any) -> Sequence[Any]:
        found = self.region_of.get(value) if isinstance(value, Node) else None
        if found is None or value not in found.region.returned:
            return (value,)
        return [n for n in found.region.entering if needs_grad(n) and n.op != "placeholder"]

    def _call(self, found: Sized) -> None:
        """The region as one call, with an item for each value that leaves it."""
        region = found.region
        call = self.graph.call_function(region_in_chunks, tuple(map(self._of, region.entering)))
        call.meta = {k: v for k, v in region.nodes[0].meta.items() if k not in ("val", "recompute")}
        call.meta["val"] = tuple(n.meta["val"] for n in region.leaving)
        call.meta["ringfx_path"] = region.name
        call.meta["ringfx_chunked"] = _held(found)
        self.regions[call] = region.nodes
        for i, value in enumerate(region.leaving):
            item = self.graph.call_function(operator.getitem, (call, i))
            item.meta = dict(value.meta)
            self.made[value] = item
            self.original[item] = value


def _held(found: Sized) -> ChunkedCall:
    region = found.region
    shared = [n for n in region.entering if needs_grad(n) and n.op == "placeholder"]
    sums = sum(n.meta["val"].nbytes for n in shared if not _summed_in_place(n.meta["val"]))
    return ChunkedCall(
        wide=found.wide_bytes, trains=region.trains, sums=sums if region.trains else 0,
        is_loss=region.is_loss,
    )  # fmt: skip


def _summed_in_place(weight: torch.Tensor) -> bool:
    """Whether its gradient is a product of matrices that is added to the sum over chunks."""
    return weight.dim() == 2 and weight.dtype in SUMMED_IN_PLACE
