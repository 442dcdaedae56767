"""One operator on split tensors as a program of its own, planned by the same passes as a model.

Uncompiled code between the programs of a model applies operators to values that are split. What the
axis table knows to run on each rank's own tokens, or as a sum of parts, runs so here too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ringfx.ir.values import Arrival, Captured
from ringfx.passes.place import PlacementMap, place
from ringfx.passes.rewrite import rewrite
from ringfx.passes.split_modes import local_shape
from ringfx.passes.split_modes.lookup import TokensByNumber
from ringfx.passes.steps import find_tokens
from ringfx.passes.verify.check import line_inputs
from ringfx.torch_compat.fake_tensors import FakeTensorMode
from ringfx.torch_compat.operators import decompositions
from ringfx.torch_compat.pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["OperandSpec", "SingleOpProgram", "single_op_program"]


@dataclass(frozen=True, kw_only=True)
class OperandSpec:
    """A tensor that the operator is given, as far as its plan depends on it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    arrival: Arrival | None
    """How it is split; None: it is whole."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SingleOpProgram:
    """What one rank runs, on its parts of what is split."""

    run: Callable[..., tuple[torch.Tensor, ...]]
    outputs: tuple[tuple[tuple[int, ...], Arrival] | None, ...]
    """For each result its whole shape and how it is split; None: it is whole."""
    structure: TreeSpec
    sends: bool
    """Whether the ranks talk to each other."""


def single_op_program(
    func: Any,
    args: Any,
    kwargs: Any,
    given: Callable[[torch.Tensor], OperandSpec],
    rank: int,
    group: str,
) -> SingleOpProgram | None:
    """The program of a call; None where it would gather, or cannot be planned."""
    leaves, structure = tree_flatten((args, kwargs))
    keys = tuple(given(x) if isinstance(x, torch.Tensor) else (type(x), x) for x in leaves)
    try:
        hash(keys)
    except TypeError:  # an argument that cannot be compared
        return None
    return _planned(func, keys, structure, rank, group)


@functools.lru_cache(maxsize=4096)
def _planned(
    func: Any, leaves: tuple[Hashable, ...], structure: TreeSpec, rank: int, group: str
) -> SingleOpProgram | None:
    if torch.Tag.nondeterministic_seeded in func.tags:
        return None  # ranks that draw for themselves are compared first
    alone = _planned_as(func, leaves, structure, rank, group, decompositions={})
    table = decompositions()
    if alone is not None or func not in table:
        return alone
    return _planned_as(func, leaves, structure, rank, group, decompositions={func: table[func]})


def _planned_as(
    func: Any,
    leaves: tuple[Hashable, ...],
    structure: TreeSpec,
    rank: int,
    group: str,
    decompositions: Mapping[Any, Callable[..., Any]],
) -> SingleOpProgram | None:
    traced = _traced(func, leaves, structure, decompositions)
    if traced is None:
        return None
    captured, shape = traced
    graph = captured.graph_module.graph
    inputs = graph.find_nodes(op="placeholder")
    tensors = [x for x in leaves if isinstance(x, OperandSpec)]
    split = {n: x.arrival for n, x in zip(inputs, tensors, strict=True) if x.arrival is not None}
    ranks = next(iter(split.values())).layout.world_size
    axes, lines = find_tokens(graph, [], ranks, split, normalized=False)
    if axes.missing or lines.arrived != set(split):
        return None
    placement = place(graph, lines)
    local = rewrite(captured, placement, {}, group=group)
    if any(move.kind.gathers for move in local.collectives) or _moves_all(placement):
        return None
    extra = line_inputs(lines, rank, placement.device)
    results: Any = graph.output_node().args[0]
    expected = [
        local_shape(lines, n) if s else None for n, s in zip(results, local.outputs, strict=True)
    ]

    def run(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made: tuple[torch.Tensor, ...] = local.graph_module(*parts, *extra)
        for value, wanted in zip(made, expected, strict=True):
            assert wanted is None or tuple(value.shape) == wanted, (
                f"{func}: {value.shape}, {wanted}"
            )
        return made

    return SingleOpProgram(
        run=run,
        outputs=tuple(
            None if x is None else (x.shape, lines.arrival(x.token_dim)) for x in local.outputs
        ),
        structure=shape,
        sends=bool(local.collectives),
    )


def _moves_all(placement: PlacementMap) -> bool:
    """Whether tokens are picked by number, and so many that it is no less than a gather."""
    return any(
        2 * node.meta["val"].numel() > node.all_input_nodes[0].meta["val"].numel()
        for node, mode in placement.modes.items()
        if isinstance(mode, TokensByNumber)
    )


def _traced(
    func: Any,
    leaves: tuple[Hashable, ...],
    structure: TreeSpec,
    decompositions: Mapping[Any, Callable[..., Any]],
) -> tuple[Captured, TreeSpec] | None:
    """A graph of the call alone, and the structure of its result."""
    mode = FakeTensorMode()
    with mode:
        fakes = [
            torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x in leaves
            if isinstance(x, OperandSpec)
        ]
    shape: list[TreeSpec] = []

    def call(*tensors: torch.Tensor) -> tuple[Any, ...]:
        given = iter(tensors)
        args, kwargs = tree_unflatten(
            [next(given) if isinstance(x, OperandSpec) else x[1] for x in leaves],  # type: ignore[index]
            structure,
        )
        results, found = tree_flatten(func(*args, **kwargs))
        shape[:] = [found]
        return tuple(results)

    try:
        with mode, torch.no_grad():
            gm = make_fx(call, decomposition_table=dict(decompositions))(*fakes)
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        return None  # its result depends on values, or it is an error that the call itself will say
    results: Any = gm.graph.output_node().args[0]
    if not results or not all(isinstance(x, torch.fx.Node) for x in results):
        return None
    names = tuple(str(func) for _ in fakes)
    no = (False,) * len(fakes)
    return Captured(graph_module=gm, input_names=names, is_parameter=no, needs_grad=no), shape[0]
