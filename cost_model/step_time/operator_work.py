"""What every operator outside attention does on one rank, forward and backward.

Products are counted by their shapes. Everything else moves bytes: Inductor makes one kernel of
operators that hand values to each other and have equally many products before them; such a group
reads what comes from outside and writes what leaves. Without fusion each operator reads its
operands and writes its result.

Backward, a product is computed once for each operand that has a gradient. Another operator reads
the gradients of what it wrote and what it needs of the forward, and writes those of its operands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ringfx.cost_model.peak_memory.liveness import Values, is_expensive, needed_by
from ringfx.cost_model.peak_memory.timeline_of import num_bytes
from ringfx.cost_model.prediction.operators import LARGE, Work
from ringfx.cost_model.prediction.products import op_name, product_flops

__all__ = ["OperatorWork", "works"]


@dataclass(frozen=True, kw_only=True)
class OperatorWork:
    """One operator's work in both directions."""

    forward: Work
    backward: Work


def works(
    values: Values,
    share: Callable[[Node], float],
    *,
    fused: bool,
    among: Collection[Node] | None = None,
) -> Mapping[Node, OperatorWork]:
    """The work of all operators but attention.

    Parameters
    ----------
    share
        Which part of a value a rank has: 1 / p of what is split over p ranks.
    fused
        Whether what can be fused is.
    among
        Operators that run together; None: all.
    """
    return _Counting(values, share, fused, among).run()


class _Counting:
    def __init__(
        self,
        values: Values,
        share: Callable[[Node], float],
        fused: bool,
        among: Collection[Node] | None,
    ) -> None:
        self.values, self.share, self.fused = values, share, fused
        runs = None if among is None else set(among)
        own = values.nodes if runs is None else [n for n in values.nodes if n in runs]
        self.nodes = [n for n in own if self._runs(n)]
        self.group = self._groups() if fused else {n: n for n in self.nodes}
        self.forward: dict[Node, float] = defaultdict(float)
        self.backward: dict[Node, float] = defaultdict(float)
        self.fresh: dict[Node, float] = defaultdict(float)
        self.fresh_grads: dict[Node, float] = defaultdict(float)

    def run(self) -> Mapping[Node, OperatorWork]:
        products = {n: flops for n in self.nodes if (flops := product_flops(n))}
        members: dict[Node, list[Node]] = defaultdict(list)
        for node in self.nodes:
            if node not in products:
                members[self.group[node]].append(node)
        found = {node: self._product(node, flops) for node, flops in products.items()}
        for group in members.values():
            self._count(group)
            for node in group:
                is_first = node is group[0]
                trains = node in self.values.has_grad
                found[node] = OperatorWork(
                    forward=Work(
                        calls=is_first,
                        bytes=self.forward[node],
                        fresh=self.fresh[node],
                        is_fused=self.fused,
                    ),
                    backward=Work(
                        calls=is_first and trains,
                        bytes=self.backward[node],
                        fresh=self.fresh_grads[node],
                        is_fused=self.fused,
                    ),
                )
        return found

    def _runs(self, node: Node) -> bool:
        """Whether it is a call that computes something: no view, no attention."""
        is_call = node.op == "call_function" and op_name(node) != "attention"
        is_own = self.values.owner[node] is node
        return is_call and is_own and isinstance(node.meta.get("val"), torch.Tensor | tuple | list)

    def _size(self, node: Node) -> float:
        return num_bytes(node) * self.share(node)

    def _fresh(self, node: Node) -> float:
        size = self._size(node)
        return size if size >= LARGE else 0.0

    # --- products -----------------------------------------------------------------------------

    def _product(self, node: Node, flops: float) -> OperatorWork:
        added = op_name(node) in ("addmm", "baddbmm")
        factors = [n for n in node.all_input_nodes[added:] if _dim(n) > 1]
        share = min(map(self.share, (node, *factors)))
        moved = sum(map(self._size, (node, *factors)))
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        times = sum(n in self.values.has_grad for n in factors)
        times *= node in self.values.has_grad
        trained = [n for n in factors if n in self.values.has_grad] if times else []
        return OperatorWork(
            forward=Work(
                dtype=dtype, calls=1, flops=flops * share, bytes=moved, fresh=self._fresh(node)
            ),
            backward=Work(
                dtype=dtype, calls=times, flops=times * flops * share, bytes=times * moved,
                fresh=sum(map(self._fresh, trained)),
            ),
        )  # fmt: skip

    # --- what is fused ------------------------------------------------------------------------

    def _groups(self) -> Mapping[Node, Node]:
        """For each operator the one that stands for its group."""
        level = self.values.level
        parent = {n: n for n in self.nodes}

        def root(node: Node) -> Node:
            while parent[node] is not node:
                parent[node] = parent[parent[node]]
                node = parent[node]
            return node

        for node in self.nodes:
            if is_expensive(node):
                continue
            for source in self.values.operands(node):
                alike = source in parent and not is_expensive(source)
                if alike and level[source] == level[node]:
                    parent[root(node)] = root(source)
        return {n: root(n) for n in self.nodes}

    def _count(self, group: Sequence[Node]) -> None:
        """Adds the bytes of a group to those of its members."""
        within, read = set(group), set()
        trains = any(n in self.values.has_grad for n in group)
        needs = trains and any(True for n in group for _ in needed_by(n, self.values))
        for node in group:
            for source in self.values.operands(node):
                if source in within or source in read:
                    continue
                read.add(source)
                size = self._size(source)
                if op_name(node) == "embedding" and source is node.all_input_nodes[0]:
                    size = self._size(node)  # of a table the rows that are looked up
                self.forward[node] += size
                if trains:
                    self.backward[node] += size * (needs and self.fused)
                    self.backward[node] += self._gradient(source)
                    if source in self.values.has_grad:
                        self.fresh_grads[node] += self._fresh(source)
            if not self.fused and trains:
                self.backward[node] += sum(map(self._size, needed_by(node, self.values)))
            if any(user not in within for user in self.values.readers.get(node, ())):
                self.forward[node] += self._size(node)
                self.fresh[node] += self._fresh(node)
                if node in self.values.has_grad:
                    self.backward[node] += self._size(node)
            kept = sum(map(self._size, self.values.hidden(node)))
            self.forward[node] += kept
            self.backward[node] += kept

    def _gradient(self, source: Node) -> float:
        """Bytes of writing a gradient, added to those of other readers."""
        if source not in self.values.has_grad:
            return 0.0
        several = len(self.values.readers.get(source, ())) > 1 and source.op != "placeholder"
        again = (1 if self.fused else 3) if several else 0
        return self._size(source) * (1 + again)


def _dim(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0
