"""Calls of every operator that capture spells out, at ordinary and at edge points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from tests.passes.capture.decomposition_samples import EDGES

__all__ = ["DEFINED", "POINTS"]

aten = torch.ops.aten
Tensor = torch.Tensor
Arguments = Callable[[Tensor], tuple[Any, ...]]
E = 4


def _with(number: float) -> Iterator[tuple[str, Tensor]]:
    """Some of the numbers, and all of them."""
    some = EDGES["ordinary"].clone()
    some[[5, 20]] = number
    yield f"some {number}", some
    yield f"all {number}", torch.full((48,), number, dtype=torch.float64)


POINTS: Mapping[str, Tensor] = {
    **EDGES,
    "equal": torch.ones(48, dtype=torch.float64),
    "saturated": torch.tensor([800.0, -800, 40, -40], dtype=torch.float64).repeat(12),
    **{k: x for n in (torch.inf, -torch.inf, torch.nan) for k, x in _with(n)},
}


def made(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _norm(*, trains: bool, eps: float, affine: bool = True) -> Arguments:
    def arguments(x: Tensor) -> tuple[Any, ...]:
        scale = (made(3), made(3).flip(0)) if affine else (None, None)
        kept = (made(3), made(3).square()) if affine or not trains else (None, None)
        return (x.view(2, 3, 8), *scale, *kept, trains, 0.1, eps, False)

    return arguments


NORMS = {
    f"{'training' if trains else 'evaluation'}, eps {eps}": _norm(trains=trains, eps=eps)
    for trains in (True, False)
    for eps in (1e-5, 0.0)
} | {"without weights": _norm(trains=True, eps=1e-5, affine=False)}


def _encoder(first: bool, mask: Tensor | None, kind: int | None) -> Arguments:
    return lambda x: (
        x.view(3, 4, E), E, 2, made(12, E), made(12), made(E, E), made(E), first, first, 1e-5,
        made(E), made(E), made(E), made(E), made(6, E), made(6), made(E, 6), made(E), mask, kind,
    )  # fmt: skip


def _self_attention(x: Tensor) -> tuple[Any, ...]:
    q = x.view(3, 4, E)
    return q, q, q, E, 2, made(12, E), made(12), made(E, E), made(E), None, False


PADDING = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
FUTURE = torch.ones(4, 4).triu(1).bool()
DEFINED: Mapping[Any, Mapping[str, Arguments]] = {
    aten.batch_norm.default: NORMS,
    aten.instance_norm.default: NORMS,
    aten._transformer_encoder_layer_fwd.default: {
        f"{'before' if first else 'after'}, {name}": _encoder(first, mask, kind)
        for first in (True, False)
        for name, mask, kind in (("all", None, None), ("padded", PADDING, 1), ("causal", FUTURE, 0))
    },
    aten._native_multi_head_attention.default: {"": _self_attention},
    aten.native_layer_norm.default: {
        "": lambda x: (x.view(6, 8), [8], made(8), made(8).flip(0), 1e-5),
        "eps 0": lambda x: (x.view(6, 8), [8], None, None, 0.0),
    },
    **{
        op: {"rows": lambda x: (x.view(6, 8), 0, False), "": lambda x: (x.view(6, 8), 1, False)}
        for op in (aten._softmax.default, aten._log_softmax.default)
    },
    aten.reshape_as.default: {"": lambda x: (x.view(6, 8), torch.zeros(4, 12))},
    aten.view_as.default: {"": lambda x: (x.view(6, 8), torch.zeros(4, 12))},
    aten.expand_as.default: {"": lambda x: (x.view(6, 1, 8), torch.zeros(6, 3, 8))},
    aten.type_as.default: {"": lambda x: (x, torch.zeros(1))},
    aten.to.other: {"": lambda x: (x, torch.zeros(1))},
    **{
        op: {"": lambda x: (x.view(2, 3, 8), None, [2.0])}
        for op in (aten.upsample_nearest1d.vec, aten._upsample_nearest_exact1d.vec)
    },
    **{
        op: {"": lambda x: (x.view(2, 3, 2, 4), None, [2.0, 3.0])}
        for op in (aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec)
    },
    **{
        op: {"": lambda x: (x.view(2, 3, 2, 2, 2), [4, 4, 2], None)}
        for op in (aten.upsample_nearest3d.vec, aten._upsample_nearest_exact3d.vec)
    },
    getattr(aten.random_, "from"): {"": lambda x: (x * 1, -2, 9)},
    aten.as_strided.default: {
        "windows that overlap": lambda x: (x.view(4, 12), (4, 5, 4), (12, 2, 1)),
        "of a transposed tensor": lambda x: (x.view(6, 8).mT, (2, 2, 8), (16, 8, 1), 8),
    },
}
"""Operator -> its calls, each made of 48 numbers."""
