"""What a read of a split output needs: each rank's own tokens, a few tokens, or all of them.

Elementwise operators, reductions and look-ups along other dimensions, and reshapes that keep tokens
together run on each rank's own tokens, and their results stay split. ``logits[:, -1]`` and
``logits[:, a:b]`` move the tokens that they name. Everything else gathers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ringfx.collectives import take_tokens

if TYPE_CHECKING:
    from ringfx.outputs import SplitSpec

__all__ = ["LocalCall", "asked_tokens", "local_call"]

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
    rule = RULES.get(func) or (_elementwise if _is_elementwise(func) else None)
    return None if rule is None else rule(func, spec, args, split)


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
    named = {a.name: a.default_value for a in func._schema.arguments}
    named.update(zip(named, args, strict=False))
    return named | dict(kwargs)


def _is_elementwise(func: Any) -> bool:
    tags = getattr(func, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags or func._schema.is_mutable:
        return False
    return torch.Tag.pointwise in tags or func in (aten._to_copy.default, aten.clone.default)


def _elementwise(
    func: Any, spec: SplitSpec, args: tuple[Any, ...], split: Split
) -> LocalCall | None:
    """Whole operands give this rank's part, or are broadcast."""
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
    missing = len(spec.shape) - value.dim()
    sizes = zip(value.shape, spec.shape[max(missing, 0) :], strict=False)
    if missing < 0 or any(size not in (1, full) for size, full in sizes):
        return None
    dim = spec.dim - missing
    if dim < 0 or value.shape[dim] == 1:
        return value
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
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
}  # fmt: skip
