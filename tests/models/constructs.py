"""Modules that use one construct each around an attention, for capture to carry or to refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tests.models.shapes import HIDDEN, Block

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


class Deep(nn.Module):
    """Layers that all stand in the checkpoint of the one before."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(depth))

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        if depth == len(self.layers):
            return x
        y = self.layers[depth](x).tanh()
        result: Tensor = checkpoint(self.forward, y, depth + 1, use_reentrant=False)
        return result


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


class Dropout(Around):
    def between(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


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


class Reentrant(Around):
    def between(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.first, x, use_reentrant=True)
        return result


class Asks(Around):
    """A policy that keeps its state: every second product is saved."""

    def between(self, x: Tensor) -> Tensor:
        seen = {"products": 0}

        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
            if op is not torch.ops.aten.mm.default:
                return False
            seen["products"] += 1
            return seen["products"] % 2 == 0

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        result: Tensor = checkpoint(self.first, x, use_reentrant=False, context_fn=contexts)
        return result


class Scaled(torch.autograd.Function):
    """Two operands, a number, two results of which one has no gradient; a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        y = x * weight
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return y, x > 0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] * weight * ctx.scale, (grads[0] * x).sum((0, 1)).clamp(-1, 1), None


class OwnBackwards(Around):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN))

    def between(self, x: Tensor) -> Tensor:
        y, positive = Scaled.apply(x, self.weight, 3.0)  # type: ignore[no-untyped-call]
        result: Tensor = Doubled.apply(y) * positive  # type: ignore[no-untyped-call]
        return result


class Rounded(torch.autograd.Function):
    """Straight through: rounds forward, passes the gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class StraightThrough(Around):
    def between(self, x: Tensor) -> Tensor:
        result: Tensor = Rounded.apply(x)  # type: ignore[no-untyped-call]
        return result + checkpoint(Rounded.apply, x, use_reentrant=False)  # type: ignore[no-any-return]


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class MarksDirty(Around):
    def between(self, x: Tensor) -> Tensor:
        result: Tensor = Dirty.apply(x * 1)  # type: ignore[no-untyped-call]
        return result


class Hidden(torch.autograd.Function):
    """Writes its second operand without saying so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: Tensor) -> Tensor:
        count.view(-1).add_(1)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * 2, None


class HiddenWrite(Around):
    def between(self, x: Tensor) -> Tensor:
        count = torch.zeros(1)
        result: Tensor = Hidden.apply(x, count)  # type: ignore[no-untyped-call]
        return result * count


class Inference(Around):
    def between(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = torch.arange(x.shape[1], dtype=x.dtype).cos()
        return x * scale.clone()[:, None]


class Detached(Around):
    def between(self, x: Tensor) -> Tensor:
        return x + (x.square().detach() - x.square()) + x.data.tanh()


class CheckpointedInALoop(Around):
    """A number is read in the loop, so that Dynamo gives the frame up."""

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = checkpoint(lambda y, run=block: run(y, is_causal=True), x, use_reentrant=False)
            if float(x.detach().sum()) > 1e9:
                x = -x
        return x


class CheckpointedUnderHooks(Around):
    """Hooks on saved tensors end a program, and the frame runs uncompiled."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
            x = checkpoint(self.first, x, is_causal=True, use_reentrant=False)
        with torch.autograd.graph.save_on_cpu():
            result: Tensor = checkpoint(self.last, x, use_reentrant=True)
        return result


class Coupled(torch.autograd.Function):
    """A reversible block: what it was given is computed again from what it gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, f: Any, g: Any, *weights: Tensor) -> Any:
        ctx.blocks, ctx.weights = (f, g), weights
        with torch.no_grad():
            x = x + f(y)
            y = y + g(x)
        ctx.save_for_backward(x, y)
        return x, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y = ctx.saved_tensors
        dx, dy = grads
        f, g = ctx.blocks
        y, gx, of_g = _undone(g, x, y, dy, ctx.weights)
        x, gy, of_f = _undone(f, y, x, dx + gx, ctx.weights)
        of_weights = [a if b is None else b if a is None else a + b for a, b in zip(of_f, of_g)]  # noqa: B905
        return dx + gx, dy + gy, None, None, *of_weights


def _undone(f: Any, x: Tensor, y: Tensor, dy: Tensor, weights: tuple[Tensor, ...]) -> Any:
    """y before f(x) was added to it, and the gradients of x and of the weights."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        added = f(x)
        dx, *rest = torch.autograd.grad(added, (x, *weights), dy, allow_unused=True)
    return y - added.detach(), dx, rest


class Reversible(Around):
    def between(self, x: Tensor) -> Tensor:
        weights = [*self.first.parameters(), *self.second.parameters()]
        x, y = Coupled.apply(x, x.tanh(), self.first, self.second, *weights)  # type: ignore[no-untyped-call]
        result: Tensor = x * y
        return result


CHECKPOINTS: Mapping[str, Callable[[], nn.Module]] = {
    "checkpoint": Checkpointed,
    "nested checkpoints": Nested,
    "reentrant checkpoint": Reentrant,
    "selective checkpointing": Selective,
    "selective checkpointing with a state": Asks,
    "checkpoints in a frame that is not compiled": CheckpointedInALoop,
    "checkpoints under hooks on saved tensors": CheckpointedUnderHooks,
}

GRADIENTS: Mapping[str, Callable[[], nn.Module]] = {
    "no_grad": NoGrad,
    "enable_grad in no_grad": GradInside,
    "inference_mode": Inference,
    "detach": Detached,
    "an autograd.Function": OwnBackward,
    "autograd.Functions with several operands and results": OwnBackwards,
    "an autograd.Function with mark_dirty (breaks the graph)": MarksDirty,
    "a reversible block, an autograd.Function that computes again (breaks the graph)": Reversible,
    "a straight-through autograd.Function, also in a checkpoint": StraightThrough,
}


class Rotated(Around):
    """Rotary positions by complex numbers."""

    def between(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        angles = torch.arange(x.shape[1])[:, None] / 10.0 ** torch.arange(HIDDEN // 2)
        turned = pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)
        return torch.view_as_real(turned).flatten(-2)


def cached_llama() -> nn.Module:
    """A Hugging Face model that returns keys and values of every layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Any:
            made = self.model(ids, use_cache=True)
            layers = made.past_key_values.layers
            return made.logits, [(layer.keys, layer.values) for layer in layers]

    return Cached()


def token_ids() -> tuple[Tensor, ...]:
    return (torch.arange(18).view(2, 9) % 37,)
