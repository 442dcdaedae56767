"""Mean losses as sum / count, so that the mean is over all tokens of all ranks.

A mean of per-rank means is wrong as soon as ranks hold different numbers of valid tokens; a sum
and a global count are right for any split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ringfx.torch_compat.operators import OpOverload, schema_of

__all__ = ["LOSS_DECOMPOSITIONS"]

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2
_NARROW = (torch.float16, torch.bfloat16)


def cross_entropy(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """Mean cross entropy: the weighted sum over the total weight of the kept targets.

    Probabilities are smoothed here, as the operator does: then zeros add nothing to a sum.
    """
    classes = x.shape[1] if x.dim() > 1 else x.shape[0]
    if target.shape == x.shape and label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / max(classes, 1)
        return aten.cross_entropy_loss.default(x, target, weight, reduction, ignore_index, 0.0)
    if reduction != MEAN:
        return NotImplemented
    total = _total(
        x.dtype,
        lambda reduction: aten.cross_entropy_loss.default(
            x, target, weight, reduction, ignore_index, label_smoothing
        ),
    )
    if target.shape == x.shape:  # class probabilities: every row counts
        return (total / (x.numel() // max(classes, 1))).to(x.dtype)
    return (total / _weight(target, weight, ignore_index)).to(x.dtype)


def _total(dtype: torch.dtype, loss: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The sum of a loss; of float16 and bfloat16 in float32, as the operator sums inside."""
    if dtype not in _NARROW:
        return loss(SUM)
    return loss(NONE).sum(dtype=torch.float32)


def negative_log_likelihood(
    op: OpOverload,
) -> Callable[..., Any]:
    """The mean of a loss that picks a class: the weighted sum over the total weight."""

    def mean(
        x: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        reduction: int = MEAN,
        ignore_index: int = -100,
    ) -> Any:
        if reduction != MEAN:
            return NotImplemented
        total = _total(x.dtype, lambda reduction: op(x, target, weight, reduction, ignore_index))
        return (total / _weight(target, weight, ignore_index)).to(x.dtype)

    return mean


def _weight(target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """The weight of all targets that are not ignored: their number without weights."""
    kept = target != ignore_index
    if weight is None:
        return kept.sum()
    chosen = weight[torch.where(kept, target, 0)]
    wide = {"dtype": torch.float32} if weight.dtype in _NARROW else {}
    return torch.where(kept, chosen, 0).sum(**wide)


_TYPE_OF: dict[OpOverload, Callable[[torch.Tensor, torch.Tensor], torch.dtype]] = {
    aten.binary_cross_entropy_with_logits.default: lambda x, target: target.dtype,
    aten.soft_margin_loss.default: lambda x, target: x.dtype,
}
"""Of losses that torch computes in place, on 1 - target and on -x."""


def elementwise(op: OpOverload) -> Callable[..., Any]:
    """The mean over all elements, of an operator that takes ``reduction`` at its own place."""
    at = [a.name for a in schema_of(op).arguments].index("reduction")

    def mean(x: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = [x, target, *args]
        by_name = "reduction" in kwargs or len(given) <= at
        if (kwargs.get("reduction", MEAN) if by_name else given[at]) != MEAN:
            return NotImplemented

        def reduced(reduction: int) -> torch.Tensor:
            if by_name:
                result: torch.Tensor = op(*given, **kwargs | {"reduction": reduction})
            else:
                result = op(*given[:at], reduction, *given[at + 1 :], **kwargs)
            return result

        shapes = [v.shape for v in (*given, *kwargs.values()) if isinstance(v, torch.Tensor)]
        dtype = _TYPE_OF.get(op, torch.result_type)(x, target)
        return (_total(dtype, reduced) / torch.broadcast_shapes(*shapes).numel()).to(dtype)

    return mean


LOSS_DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {
    aten.cross_entropy_loss.default: cross_entropy,
    **{
        op: negative_log_likelihood(op)
        for op in (aten.nll_loss_nd.default, aten.nll_loss.default, aten.nll_loss2d.default)
    },
    **{
        op: elementwise(op)
        for op in (
            aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default,
            aten.huber_loss.default, aten.binary_cross_entropy.default,
            aten.binary_cross_entropy_with_logits.default, aten.soft_margin_loss.default,
        )
    },
}  # fmt: skip
