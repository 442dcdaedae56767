"""Modules that use one construct each around an attention, for capture to carry or to refuse."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
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


CHECKPOINTS: Mapping[str, Callable[[], nn.Module]] = {
    "checkpoint": Checkpointed,
    "nested checkpoints": Nested,
    "reentrant checkpoint": Reentrant,
    "selective checkpointing": Selective,
    "selective checkpointing with a state": Asks,
}

GRADIENTS: Mapping[str, Callable[[], nn.Module]] = {
    "no_grad": NoGrad,
    "enable_grad in no_grad": GradInside,
    "inference_mode": Inference,
    "detach": Detached,
    "an autograd.Function": OwnBackward,
    "autograd.Functions with several operands and results": OwnBackwards,
    "an autograd.Function with mark_dirty (breaks the graph)": MarksDirty,
    "a straight-through autograd.Function, also in a checkpoint": StraightThrough,
}


def without_gradient(x: Tensor) -> Tensor:
    y = x * 2
    with torch.no_grad():
        y.mul_(3)
    return y


def through_detach(x: Tensor) -> Tensor:
    y = x * 2
    y.detach().mul_(3)
    return y


def through_unfold(x: Tensor) -> Tensor:
    y = x.detach() * 2
    y.unfold(1, 2, 2).mul_(3)
    return y + x


WRITES_REFUSED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "without a gradient, into a value that has one": without_gradient,
    "through detach, into a value that has a gradient": through_detach,
    "through unfold": through_unfold,
}

REFUSED_WRITES: Mapping[str, tuple[str, str]] = {
    "without a gradient, into a value that has one": (
        "writes without gradients into a value that has one",
        "later uses would pass the gradient of what was overwritten",
    ),
    "through detach, into a value that has a gradient": (
        "through a detached view", "the same"
    ),
    "through unfold": ("aten.unfold.default, which has no inverse", "a view without an inverse"),
}  # fmt: skip


class RefusedWrites(Around):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def between(self, x: Tensor) -> Tensor:
        return WRITES_REFUSED[self.name](x)


class Encoder(nn.Module):
    """Layers of torch itself, with causal or padding masks."""

    def __init__(self, heads: int = 2, padded: bool = False, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, heads, 40, 0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.padded = padded

    def forward(self, x: Tensor) -> Tensor:
        padding = None
        if self.padded:
            padding = torch.arange(x.shape[1])[None] >= torch.tensor([[x.shape[1]], [4]])
        result: Tensor = self.encoder(x, src_key_padding_mask=padding)
        return result


class CausalEncoder(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        result: Tensor = self.encoder(x, mask=mask, is_causal=True)
        return result


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(HIDDEN, HEADS, 40, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.decoder(x, x[:, :5] * 2)
        return result


def evaluated(make: Callable[[], nn.Module]) -> nn.Module:
    return make().eval()


LAYERS: Mapping[str, Callable[[], nn.Module]] = {
    "nn.MultiheadAttention": functools.partial(MultiHead, need_weights=False),
    "nn.MultiheadAttention, weights returned": functools.partial(MultiHead, need_weights=True),
    "nn.TransformerEncoder": Encoder,
    "nn.TransformerEncoder, causal": CausalEncoder,
    "nn.TransformerEncoder, padding": functools.partial(Encoder, padded=True),
    "nn.TransformerDecoder": Decoder,
}

EVALUATED: Mapping[str, Callable[[], nn.Module]] = {
    "fused nn.TransformerEncoderLayer": functools.partial(evaluated, Encoder),
    "fused nn.TransformerEncoderLayer, norm first": functools.partial(
        evaluated, functools.partial(Encoder, norm_first=True, activation="gelu")
    ),
    "fused nn.TransformerEncoderLayer, causal": functools.partial(evaluated, CausalEncoder),
    "fused nn.TransformerEncoderLayer, padding": functools.partial(
        evaluated, functools.partial(Encoder, padded=True)
    ),
    "fused nn.MultiheadAttention": functools.partial(
        evaluated, functools.partial(MultiHead, need_weights=False)
    ),
}


class Draws(Around):
    def between(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)  # both the model and its oracle draw the same
        return x + torch.randn_like(x) * torch.rand(x.shape[1])[:, None]


class DrawsInPlace(Around):
    def between(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        noise = torch.empty_like(x, requires_grad=False).uniform_(0.5, 1.5)
        keep = torch.empty(x.shape[1], dtype=x.dtype).bernoulli_(0.5)
        return x * noise * keep[:, None]


class SeededDropout(Around):
    def between(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return nn.functional.dropout(x, 0.5, training=True)


RANDOM: Mapping[str, Callable[[], nn.Module]] = {
    "dropout": SeededDropout,
    "rand, randn_like": Draws,
    "uniform_, bernoulli_": DrawsInPlace,
}

log = logging.getLogger("tests.passes.constructs")


class Logs(Around):
    def between(self, x: Tensor) -> Tensor:
        log.warning("a line of a log")
        return x * 2


class Chosen(Around):
    """How many elements there are depends on the data."""

    def between(self, x: Tensor) -> Tensor:
        return x + x[x > 0].mean()


class Region(Around):
    """One region that is called twice is compiled once."""

    def between(self, x: Tensor) -> Tensor:
        region = torch.compiler.nested_compile_region(lambda y: (y * 2).sin())
        result: Tensor = region(region(x))
        return result


CONTROL: Mapping[str, Callable[[], nn.Module]] = {
    "a graph break": Broken,
    "a log line": Logs,
    "a number from a tensor": Items,
    "a size that depends on data": Chosen,
    "a repeated region": Region,
}


class Branches(Around):
    def between(self, x: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x,))
        return result


class Loops(Around):
    def between(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        def going(i: Tensor, y: Tensor) -> Tensor:
            return i < 3

        def step(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, y * 1.5

        _, result = while_loop(going, step, (torch.zeros((), dtype=torch.int64), x))
        return result  # type: ignore[no-any-return]


class Scans(Around):
    def between(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        def step(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            carry = carry * 0.5 + row
            return carry, carry.clone()

        _, rows = scan(step, torch.zeros_like(x[:, 0]), x, dim=1)
        result: Tensor = rows.movedim(0, 1) if rows.shape[0] == x.shape[1] else rows
        return result


REFUSED_CONTROL: Mapping[str, tuple[Callable[[], nn.Module], str, str]] = {
    "torch.cond": (Branches, "torch.cond", "its branch depends on data"),
    "torch.while_loop": (Loops, "torch.while_loop", "its length depends on data"),
    "a scan": (Scans, "a scan", "a recurrence along an axis"),
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
