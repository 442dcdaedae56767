"""One program for many lengths: what the local programs of a few of them have in common.

The passes write a length's numbers into its local program. Here the programs of several lengths are
read as one text with gaps: where all have the same number it stays, where they differ it must be
one function, times a base plus a constant. Bases are the lengths themselves and, for each sharded
line, how many tokens a run of positions has (``Layout.chunk_length``). With these as its inputs
there is one program, whose sizes are symbols for the compiler.

A text is a guess about other lengths, never a proof. So whoever runs it compares it, filled in,
with what the passes write for that very length (``GeneralProgram.serves``).
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ringfx.ir.markers import OFFLOADED
from ringfx.ops import attention
from ringfx.passes.rewrite import LocalProgram
from ringfx.torch_compat.fake_tensors import FakeTensor
from ringfx.torch_compat.operators import OpOverload

__all__ = ["Affine", "Outline", "fitted", "generalized", "outlined"]

SAID = ("recompute", "ac_graph_id", OFFLOADED)
"""What a node's meta tells the compiler."""


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A local program as a text with gaps, and the numbers in them."""

    text: str
    """Equal for programs that differ in numbers only."""
    numbers: tuple[int, ...]
    bases: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Affine:
    """times * base + plus."""

    base: int
    times: int
    plus: int

    def at(self, bases: Sequence[Any]) -> Any:
        return self.plus if self.times == 0 else self.times * bases[self.base] + self.plus


def outlined(local: LocalProgram, lengths: Sequence[int]) -> Outline:
    """The outline of the program of these lengths.

    Raises
    ------
    ValueError
        It holds something that cannot be compared.
    """
    if local.bodies:
        raise ValueError("it holds regions in chunks")
    lines = local.placement.lines.lines
    runs = [x.layout.chunk_length for x in lines if x.layout.world_size > 1]
    reader = _Reader()
    for node in local.graph_module.graph.nodes:
        reader.visit_node(node, local.graph_module)
    text = hashlib.sha256("\n".join(reader.said).encode()).hexdigest()
    return Outline(text=text, numbers=tuple(reader.numbers), bases=(*runs, *lengths))


def fitted(outlines: Sequence[Outline]) -> tuple[Affine, ...] | None:
    """A function for each gap that gives the numbers of all these outlines; None: there is none."""
    found = []
    for numbers in zip(*(x.numbers for x in outlines), strict=True):
        function = _function(numbers, [x.bases for x in outlines])
        if function is None:
            return None
        found.append(function)
    return tuple(found)


def _function(numbers: Sequence[int], bases: Sequence[Sequence[int]]) -> Affine | None:
    """The first base of which all numbers are a function. More than two of them are given, and
    no two have a base in common."""
    if len(set(numbers)) == 1:
        return Affine(base=0, times=0, plus=numbers[0])
    for base in range(len(bases[0])):
        points = list(zip((b[base] for b in bases), numbers, strict=True))
        (x0, y0), (x1, y1), *_ = points
        times, rest = divmod(y1 - y0, x1 - x0)
        if rest == 0 and all(times * (x - x0) + y0 == y for x, y in points):
            return Affine(base=base, times=times, plus=y0 - times * x0)
    return None


def generalized(
    local: LocalProgram, functions: Sequence[Affine], num_bases: int
) -> tuple[GraphModule, list[tuple[Affine, ...]]]:
    """The program with its bases as further inputs, behind all others; and of each input before
    them the number that it is, or the sizes and strides of the tensor."""
    writer = _Writer(functions, num_bases)
    for node in local.graph_module.graph.nodes:
        writer.copy(node)
    made = GraphModule(local.graph_module, writer.graph, "RingfxGeneral")
    made.graph.lint()
    return made, writer.forms


@dataclass(eq=False)
class _Reader:
    """Says everything of a program but its numbers, and these apart, in one fixed order."""

    said: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    order: dict[Node, int] = field(default_factory=dict)

    def visit_node(self, node: Node, gm: GraphModule) -> None:
        self.order[node] = len(self.order)
        told = [f"{key}={node.meta[key]}" for key in SAID if key in node.meta]
        self.said.append(f"{node.op} {_target(node, gm)} {' '.join(told)}")
        if node.op == "placeholder":
            self.visit(_form(node.meta.get("val")))
        self.visit(_arguments(node))

    def visit(self, value: Any) -> Any:
        """The value with what ``number`` makes of each number in it."""
        if isinstance(value, Node):
            self.said.append(f"%{self.order[value]}")
            return self.node(value)
        if type(value) is int:
            self.said.append("#")
            return self.number(value)
        if isinstance(value, list | tuple):
            self.said.append(f"{type(value).__name__} {len(value)}")
            parts = [self.visit(part) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        if isinstance(value, dict):
            self.said.append(f"dict {list(value)}")
            return {key: self.visit(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(*(self.visit(x) for x in (value.start, value.stop, value.step)))
        if not isinstance(value, _PLAIN):
            raise ValueError(f"it holds {type(value).__name__} {value!r:.60}")
        self.said.append(repr(value))
        return value

    def node(self, value: Node) -> Any:
        return value

    def number(self, value: int) -> Any:
        self.numbers.append(value)
        return value


_PLAIN = (
    bool, float, complex, str, type(None), torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip


class _Writer(_Reader):
    """Copies a program, with functions of its bases in the gaps."""

    def __init__(self, functions: Sequence[Affine], num_bases: int) -> None:
        super().__init__()
        self.graph = Graph()
        self.forms: list[tuple[Affine, ...]] = []
        self._made: dict[Node, Node] = {}
        self._rest: Iterator[Affine] = iter(functions)
        self._num_bases = num_bases
        self._bases: list[Node] = []
        self._sizes: dict[Affine, Node] = {}
        self._last: Node | None = None

    def copy(self, node: Node) -> None:
        self.order[node] = len(self.order)
        if node.op == "placeholder":
            self.visit_given(node)
            return
        if not self._bases:
            self._add_bases()
        args, kwargs = self.visit(_arguments(node))
        if node.target is attention:
            kwargs = self._with_open_text(kwargs)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta = {key: x for key, x in node.meta.items() if key != "val"}
        self._made[node] = new

    def visit_given(self, node: Node) -> None:
        made = self.graph.placeholder(str(node.target))
        made.meta = {key: x for key, x in node.meta.items() if key != "val"}
        self._made[node] = made
        reader = _Reader()
        reader.visit(_form(node.meta.get("val")))
        self.forms.append(tuple(next(self._rest) for _ in reader.numbers))
        self.visit(_arguments(node))

    def node(self, value: Node) -> Node:
        return self._made[value]

    def number(self, value: int) -> Any:
        function = next(self._rest)
        return function.plus if function.times == 0 else self._size(function)

    def _add_bases(self) -> None:
        self._bases = [self.graph.placeholder(f"base_{i}") for i in range(self._num_bases)]
        self._last = self._bases[-1]

    def _size(self, function: Affine) -> Node:
        """The node of a number; all stand at the beginning."""
        if function not in self._sizes:
            assert self._last is not None
            with self.graph.inserting_after(self._last):
                made = self._bases[function.base]
                if function.times != 1:
                    made = self.graph.call_function(operator.mul, (made, function.times))
            if function.plus:
                with self.graph.inserting_after(self._last if made in self._bases else made):
                    made = self.graph.call_function(operator.add, (made, function.plus))
            self._sizes[function] = made
        return self._sizes[function]

    def _with_open_text(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The attention's text with gaps, and the numbers for them as another argument."""
        sizes: list[Node] = []

        def opened(value: Any) -> Any:
            if isinstance(value, Node):
                sizes.append(value)
                return f"${len(sizes) - 1}"
            if isinstance(value, dict):
                return {key: opened(part) for key, part in value.items()}
            return [opened(part) for part in value] if isinstance(value, list) else value

        text = json.dumps(opened(kwargs["spec"]), sort_keys=True)
        return kwargs | {"spec": text, "sizes": tuple(sizes)}


def _arguments(node: Node) -> tuple[Any, dict[str, Any]]:
    """Arguments; an attention's text as what it says."""
    if node.target is not attention:
        return node.args, dict(node.kwargs)
    return node.args, dict(node.kwargs) | {"spec": json.loads(str(node.kwargs["spec"]))}


def _form(value: Any) -> Any:
    """What a program is compiled for of an input."""
    if not isinstance(value, torch.Tensor):
        return value
    return (list(value.shape), list(value.stride()), value.dtype, value.device)


def _target(node: Node, gm: GraphModule) -> str:
    """The function that is called; of a constant its values."""
    if node.op == "placeholder":
        return node.name
    if node.op != "get_attr":
        return node.target if isinstance(node.target, str) else _name(node.target)
    value = operator.attrgetter(str(node.target))(gm)
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        raise ValueError(f"it holds {type(value).__name__} {node.target}")
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(raw.numpy().tobytes()).hexdigest()
    return f"{digest} {tuple(value.shape)} {value.dtype} {value.device}"


def _name(target: Callable[..., Any]) -> str:
    if isinstance(target, OpOverload):
        return str(target)
    return f"{target.__module__}.{getattr(target, '__qualname__', target)}"
