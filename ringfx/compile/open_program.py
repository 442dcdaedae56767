"""What Dynamo captured with some sizes left open: the program for any length.

Dynamo's guards say for which sizes its text holds. The passes work on numbers: they are given a
copy of the text and inputs of one length at a time, and nothing here makes Dynamo guard on it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from ringfx.ir.values import Captured
from ringfx.passes.token_axes import Lines
from ringfx.torch_compat.fake_tensors import FakeTensor, FakeTensorMode, TracingContext
from ringfx.torch_compat.symbols import Condition, conditions, evaluated, hint_of, symbol_of

__all__ = ["OpenProgram", "lengths_in", "specialize"]

Sizes = tuple[tuple[Any, ...], tuple[Any, ...]]
"""Shape and strides of a tensor, with symbols."""


@dataclass(frozen=True, eq=False, kw_only=True)
class OpenProgram:
    """A program of Dynamo's, some of whose inputs have symbols for sizes."""

    graph_module: GraphModule
    tensors: Mapping[int, Sizes]
    """Inputs with symbols among their sizes, by their number."""
    numbers: Mapping[int, Any]
    """Inputs that are sizes themselves."""
    symbols: Mapping[str, int]
    """Symbol -> the input that is its number."""
    traced: Mapping[str, int]
    """Symbol -> the number that it had when Dynamo traced."""
    holds: Condition
    """Whether Dynamo's text is that of the model at these numbers."""

    @staticmethod
    def of(gm: GraphModule, example_inputs: Sequence[Any]) -> OpenProgram | None:
        """None if all sizes are numbers."""
        sizes = {i: v for i, v in enumerate(example_inputs) if isinstance(v, torch.SymInt)}
        symbols = {name: i for i, v in sizes.items() if (name := symbol_of(v)) is not None}
        context = TracingContext.try_get()
        if not symbols or context is None or context.fake_mode is None:
            return None
        values = [n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder")]
        return OpenProgram(
            graph_module=_copied(gm),
            tensors={
                i: (tuple(v.shape), tuple(v.stride()))
                for i, v in enumerate(values)
                if isinstance(v, FakeTensor)
                and any(isinstance(s, torch.SymInt) for s in (*v.shape, *v.stride()))
            },
            numbers=sizes,
            symbols=symbols,
            traced={name: hint_of(sizes[i]) for name, i in symbols.items()},
            holds=conditions(context.fake_mode),
        )

    def text(self) -> GraphModule:
        """Dynamo's program once more: the passes change what they are given."""
        return _copied(self.graph_module)

    def inputs_at(self, numbers: Mapping[str, int], given: Sequence[Any]) -> list[Any]:
        """Inputs of those sizes, without values; ``given`` as it is where nothing is open."""
        context = TracingContext.try_get()
        mode = (context and context.fake_mode) or FakeTensorMode()
        found = list(given)
        for i, size in self.numbers.items():
            found[i] = evaluated(size, numbers)
        for i, (shape, strides) in self.tensors.items():
            sizes, steps = ([evaluated(s, numbers) for s in x] for x in (shape, strides))
            with mode:
                made = torch.empty_strided(
                    sizes, steps, dtype=given[i].dtype, device=given[i].device
                )
            found[i] = made.requires_grad_(given[i].requires_grad)
        return found


def lengths_in(program: OpenProgram, captured: Captured, lines: Lines) -> tuple[str, ...]:
    """The symbols that are numbers of tokens: sizes of dimensions that hold tokens of a line."""
    inputs = captured.graph_module.graph.find_nodes(op="placeholder")
    found = {
        symbol_of(program.tensors[i][0][d])
        for i, node in enumerate(inputs)
        if i in program.tensors
        for d in lines.dims_with_tokens(node)
    }
    return tuple(name for name in program.symbols if name in found)


def specialize(program: OpenProgram, kept: Collection[str]) -> None:
    """Makes Dynamo guard on the numbers of all symbols but these."""
    for name, i in program.symbols.items():
        if name not in kept:
            int(program.numbers[i])


def _copied(gm: GraphModule) -> GraphModule:
    """The same program with nodes of its own, in the bodies that it calls too."""
    made = GraphModule(gm, copy.deepcopy(gm.graph))
    for name, child in gm.named_children():
        if isinstance(child, GraphModule):
            setattr(made, name, _copied(child))
    made.meta = dict(gm.meta)
    if hasattr(gm, "compile_subgraph_reason"):
        made.compile_subgraph_reason = gm.compile_subgraph_reason
    return made
