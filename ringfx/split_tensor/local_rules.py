"""What a read of a split output needs: each rank's own tokens, a few tokens, or all of them.

Elementwise operators, reductions and look-ups along other dimensions, and reshapes that keep tokens
together run on each rank's own tokens, and their results stay split. ``logits[:, -1]`` and
``logits[:, a:b]`` move the tokens that they name, ``x.isnan().any()`` and other reductions to one
number a number from each rank. Everything else gathers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ringfx.comm.conjugate import take_tokens
from ringfx.torch_compat.operators import schema_of

if TYPE_CHECKING:
    from ringfx.split_tensor.spec import SplitSpec

__all__ = [
    "LocalCall",
    "ToOne",
    "asked_tokens",
    "local_call",
    "reduce_to_one",
    "writes_where_it_is",
]

aten = torch.ops.aten
Split: TypeAlias = Callable[[Any], torch.Tensor | None]


@dataclass(frozen=True, kw_only=True)
class LocalCall:
    """Arguments on this rank's tokens, and where the result holds tokens."""

    args: tuple[Any, ...]
    dim: int
    outer: int
    inner: int


def local_call(func: Any, spec: SplitSpec, args: tuple[Any, ...], split: Split) -> LocalCall | None:
    """The call on this rank's own tokens; None where it needs those of others.

    ``split`` gives the local part of a split argument, None for others.
    """
    alone = _is_elementwise(func) or _writes_elementwise(func)
    rule = RULES.get(func) or (_elementwise if alone else None)
    return None if rule is None else rule(func, spec, args, split)


def reduce_to_one(func: Any, kwargs: Mapping[str, Any]) -> ToOne | None:
    """How a reduction of all elements is put together from each rank's; None for other calls."""
    known = {"dtype"} if func in (aten.sum.default, aten.mean.default) else set()
    return TO_ONE.get(func) if set(kwargs) <= known else None


def asked_tokens(
    func: Any, spec: SplitSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[range, tuple[Any, ...]] | None:
    """The tokens that a call asks for by number, and its further arguments on these alone."""
    if spec.outer * spec.inner != 1 or func not in (aten.select.int, aten.slice.Tensor):
        return None
    bound = _bound(func, args, kwargs)
    if bound["dim"] % len(spec.shape) != spec.dim:
        return None
    elements = range(spec.length)
    if func is aten.select.int:
        one = elements[bound["index"]]
        return range(one, one + 1), (spec.dim, 0)
    asked = elements[bound["start"] : bound["end"] : bound["step"]]
    return asked, (spec.dim, 0, len(asked))


def _bound(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    named = {a.name: a.default_value for a in schema_of(func).arguments}
    named.update(zip(named, args, strict=False))
    return named | dict(kwargs)


def _is_elementwise(func: Any) -> bool:
    tags = getattr(func, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or schema_of(func).is_mutable:
        return False
    return torch.Tag.pointwise in tags or func in (aten._to_copy.default, aten.clone.default)


def writes_where_it_is(func: Any) -> bool:
    """Whether a call may write each token of its first operand from the same token of others."""
    return func is aten.index_put_.default or _writes_elementwise(func)


def _writes_elementwise(func: Any) -> bool:
    schema, tags = schema_of(func), getattr(func, "tags", ())
    written = [a.is_write for a in schema.arguments]
    if torch.Tag.nondeterministic_seeded in tags or written[:1] != [True] or any(written[1:]):
        return False
    alone = (aten.copy_.default, aten.fill_.Scalar, aten.zero_.default)
    return torch.Tag.pointwise in tags or func in alone


def _elementwise(
    func: Any, spec: SplitSpec, args: tuple[Any, ...], split: Split
) -> LocalCall | None:
    """Whole operands give this rank's part, or are broadcast; ``spec`` has the most dimensions."""
    parts: list[Any] = []
    for value in args:
        part = split(value)
        if part is None and isinstance(value, torch.Tensor):
            part = _own(value, spec)
            if part is None:
                return None
        parts.append(value if part is None else part)
    return LocalCall(args=tuple(parts), dim=spec.dim, outer=spec.outer, inner=spec.inner)


def _own(value: torch.Tensor, spec: SplitSpec) -> torch.Tensor | None:
    """This rank's part of a whole operand; None where it is larger than the split one."""
    dim = spec.dim - len(spec.shape) + value.dim()
    if value.dim() > len(spec.shape):
        return None
    if dim < 0 or value.shape[dim] == 1:
        return value
    if value.shape[dim] != spec.shape[spec.dim]:
        return None
    index, _ = spec.index(value.device)
    return take_tokens(value, index, dim, spec.outer, spec.inner)


def _along_others(
    func: Any, spec: SplitSpec, args: tuple[Any, ...], split: Split
) -> LocalCall | None:
    """Dimensions that are not the tokens' are reduced, looked up in or sorted."""
    bound, local = _bound(func, args, {}), split(args[0])
    asked = bound["dim"]
    if local is None or asked is None or asked == []:
        return None
    rank = len(spec.shape)
    along = {d % rank for d in (asked if isinstance(asked, (list, tuple)) else [asked])}
    if spec.dim in along:
        return None
    keeps = bound.get("keepdim", func is not aten.select.int)
    dim = spec.dim if keeps else spec.dim - sum(d < spec.dim for d in along)
    return LocalCall(args=(local, *args[1:]), dim=dim, outer=spec.outer, inner=spec.inner)


def _reshape(func: Any, spec: SplitSpec, args: tuple[Any, ...], split: Split) -> LocalCall | None:
    """Where a dimension of the new shape is [outer, tokens, inner]."""
    local, shape = split(args[0]), [int(s) for s in args[1]]
    if local is None:
        return None
    if -1 in shape:
        shape[shape.index(-1)] = math.prod(spec.shape) // -math.prod(shape)
    after = spec.inner * math.prod(spec.shape[spec.dim + 1 :])
    for dim, size in enumerate(shape):
        inner, rest = divmod(after, math.prod(shape[dim + 1 :]))
        if rest == 0 and inner > 0 and size % (spec.length * inner) == 0:
            outer = size // (spec.length * inner)
            shape[dim] = outer * spec.layout.local_length * inner
            return LocalCall(args=(local.contiguous(), shape), dim=dim, outer=outer, inner=inner)
    return None


@dataclass(frozen=True, kw_only=True)
class ToOne:
    """The call on each rank's own tokens, the call on all ranks' results, and what follows it."""

    part: Callable[..., torch.Tensor]
    joined: Callable[[torch.Tensor], torch.Tensor]
    is_mean: bool = False


def _accumulated(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A sum that is not rounded to a short type before it is complete."""
    short = x.dtype in (torch.bfloat16, torch.float16) and kwargs.get("dtype") is None
    return x.sum(dtype=torch.float32) if short else x.sum(**kwargs)


TO_ONE: Mapping[Any, ToOne] = {
    aten.sum.default: ToOne(part=_accumulated, joined=torch.sum),
    aten.mean.default: ToOne(part=_accumulated, joined=torch.sum, is_mean=True),
    aten.max.default: ToOne(part=torch.max, joined=torch.max),
    aten.min.default: ToOne(part=torch.min, joined=torch.min),
    aten.any.default: ToOne(part=torch.any, joined=torch.any),
    aten.all.default: ToOne(part=torch.all, joined=torch.all),
}


def _indexed(func: Any, spec: SplitSpec, args: tuple[Any, ...], split: Split) -> LocalCall | None:
    """``x[mask]``, and a write there, where the indices are whole and of other dimensions."""
    local, indices = split(args[0]), args[1]
    if local is None or any(split(i) is not None for i in indices):
        return None
    at = indexed_dims(indices)
    if not at or spec.dim in at:
        return None
    width = max(1 if _is_mask(i) else i.dim() for i in indices if i is not None)
    together = at == list(range(at[0], at[-1] + 1))
    before = sum(d not in at for d in range(spec.dim))
    dim = before + (width if not together or spec.dim > at[0] else 0)
    rest = len(spec.shape) - len(at) + width - dim
    if func is aten.index.Tensor:
        return LocalCall(args=(local, indices), dim=dim, outer=spec.outer, inner=spec.inner)
    values = split(args[2])
    if values is None and args[2].numel() == 1:
        values = args[2]
    if values is None or rest != len(spec.shape) - spec.dim:
        return None
    args = (local, indices, values, *args[3:])
    return LocalCall(args=args, dim=spec.dim, outer=spec.outer, inner=spec.inner)


def indexed_dims(indices: Sequence[torch.Tensor | None]) -> list[int]:
    """The dimensions that are indexed; a mask indexes as many as it has."""
    found: list[int] = []
    d = 0
    for index in indices:
        width = index.dim() if index is not None and _is_mask(index) else 1
        found += range(d, d + width) if index is not None else ()
        d += width
    return found


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


Rule: TypeAlias = Callable[[Any, "SplitSpec", tuple[Any, ...], Split], LocalCall | None]

RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(
        (
            aten.argmax.default, aten.argmin.default, aten.amax.default, aten.amin.default,
            aten.sum.dim_IntList, aten.mean.dim, aten.max.dim, aten.min.dim,
            aten.logsumexp.default, aten.select.int, aten.slice.Tensor, aten._softmax.default,
            aten._log_softmax.default, aten.topk.default, aten.sort.default,
        ),
        _along_others,
    ),
    **dict.fromkeys(
        (aten.index.Tensor, aten.index_put.default, aten.index_put_.default), _indexed
    ),
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
}  # fmt: skip
