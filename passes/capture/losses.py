"""Mean losses as sum / count, so that the mean is over all tokens of all ranks.

A mean of per-rank means is wrong as soon as ranks hold different numbers of valid tokens; a sum
and a global count are right for any split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["LOSS_DECOMPOSITIONS"]

aten = torch.ops.aten
MEAN, SUM = 1, 2


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
    total = aten.cross_entropy_loss.default(x, target, weight, SUM, ignore_index, label_smoothing)
    if target.shape == x.shape:  # class probabilities: every row counts
        return total / (x.numel() // max(classes, 1))
    return total / _weight(target, weight, ignore_index)


def negative_log_likelihood(
    op: torch._ops.OpOverload,
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
        return op(x, target, weight, SUM, ignore_index) / _weight(target, weight, ignore_index)

    return mean


def _weight(target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """The weight of all targets that are not ignored: their number without weights."""
    kept = target != ignore_index
    if weight is None:
        return kept.sum()
    chosen = weight[torch.where(kept, target, 0)]
    return torch.where(kept, chosen, 0).sum()


def elementwise(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The mean over all elements, of an operator that takes ``reduction`` at its own place."""
    at = [a.name for a in op._schema.arguments].index("reduction")

    def mean(x: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = [x, target, *args]
        by_name = "reduction" in kwargs or len(given) <= at
        if (kwargs.get("reduction", MEAN) if by_name else given[at]) != MEAN:
            return NotImplemented
        if by_name:
            kwargs = kwargs | {"reduction": SUM}
        else:
            given[at] = SUM
        shapes = [v.shape for v in (*given, *kwargs.values()) if isinstance(v, torch.Tensor)]
        return op(*given, **kwargs) / torch.broadcast_shapes(*shapes).numel()

    return mean


LOSS_DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
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
