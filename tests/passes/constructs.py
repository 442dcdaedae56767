"""Modules that use one construct each around an attention, for capture to carry or to refuse."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.passes.models import HEADS, HIDDEN, Block

Tensor = torch.Tensor


def total(output: Any) -> Tensor:
    """A loss in which every element counts differently."""
    leaves = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor)]
    parts = [t * torch.arange(t.numel(), dtype=t.dtype).view(t.shape).cos() for t in leaves]
    return torch.stack([part.square().sum() for part in parts if part.numel()]).sum()


class Around(nn.Module):
    """Two blocks; subclasses put a construct between or around them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x, is_causal=True)))

    def last(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(x, is_causal=True)
        return result

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Checkpointed(Around):
    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = checkpoint(block, x, is_causal=True, use_reentrant=False)
        return x


class Nested(Around):
    """A checkpoint inside a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.outer, x, use_reentrant=False)
        return result

    def outer(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.first, x, use_reentrant=False))


def selective() -> Any:
    return create_selective_checkpoint_contexts(keep_products)


def keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE
        if op is torch.ops.aten.mm.default
        else CheckpointPolicy.PREFER_RECOMPUTE
    )


class Selective(Around):
    def between(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.first, x, use_reentrant=False, context_fn=selective)
        return result


class Doubled(torch.autograd.Function):
    """The identity whose gradient is twice what tracing its forward would give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class OwnBackward(Around):
    def between(self, x: Tensor) -> Tensor:
        result: Tensor = Doubled.apply(x)  # type: ignore[no-untyped-call]
        return result


class Mapped(Around):
    def between(self, x: Tensor) -> Tensor:
        result: Tensor = torch.vmap(lambda row: row * row.mean())(x)
        return result


class InPlace(Around):
    """Writes into values of its own: a chain, a slice of a fresh tensor, an activation."""

    def between(self, x: Tensor) -> Tensor:
        y = x * 2
        y += x
        y.mul_(0.5).add_(1.0)
        result: Tensor = y.masked_fill_(y > 3, 3.0)
        return result


class InPlaceOnInput(Around):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.last(x)


class InPlaceOnView(Around):
    """The base is read after its view was written."""

    def between(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].mul_(3)
        return y


class InPlaceUnderView(Around):
    """A view is read after its base was written."""

    def between(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y.transpose(1, 2)
        y.mul_(3)
        result: Tensor = view.transpose(1, 2) + x
        return result


class ByIndex(Around):
    def between(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, :-1]
        return y + x


class NoGrad(Around):
    """What is computed without gradients passes none, what is detached neither."""

    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.square().mean(-1, keepdim=True).rsqrt()
            frozen = self.first(x)
        result: Tensor = x * scale + frozen + x.detach().tanh()
        return result


class GradInside(Around):
    """A region with gradients inside one without."""

    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
            with torch.enable_grad():
                z = x * 3
        return y + z


class AutocastRegion(Around):
    def between(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.first(x)
        with torch.autocast("cpu", enabled=False):
            result: Tensor = y.to(x.dtype) + x
            return result


class Buffers(Around):
    """Counts its calls and keeps a running mean, as normalisations do."""

    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(HIDDEN))

    def between(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        return x - self.mean


class ReadBuffers(Around):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(HIDDEN))

    def between(self, x: Tensor) -> Tensor:
        return x - self.mean


class Broken(Around):
    def between(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x * 2


class MultiHead(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.first = Block()
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Any:
        x = self.first(x, is_causal=True)
        return self.attention(x, x, x, need_weights=self.need_weights)


class EncoderLayer(nn.Module):
    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            HIDDEN, HEADS, 40, dropout=0.0, batch_first=True, norm_first=norm_first
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


class EvaluatedLayer(EncoderLayer):
    """In eval and without gradients this is one fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()


class Dropout(Around):
    def between(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class Items(Around):
    """Control flow that asks a tensor for a number."""

    def between(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 1e9 else x * 3


def loss(kind: str, **options: Any) -> functools.partial[Any]:
    return functools.partial(WithLoss, kind, **options)


class WithLoss(Around):
    """A loss inside the model, so that capture sees it."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.kind = kind
        self.options = options

    def forward(  # type: ignore[override]
        self, x: Tensor, target: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        y = self.last(self.first(x, is_causal=True))
        function = getattr(nn.functional, self.kind)
        if self.kind == "cross_entropy":
            y = y.transpose(1, 2)
        extra = {} if weight is None else {"weight": weight}
        result: Tensor = function(y, target, **extra, **self.options)
        return result
