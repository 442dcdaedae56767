"""Decompositions of operators that hide writes, or that are a complete layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from ringfx.errors import CaptureRefused
from ringfx.passes.capture.strided import as_views, refuse_scatter
from ringfx.torch_compat.operators import OpOverload

__all__ = ["DEFINITIONS"]

aten = torch.ops.aten
Tensor = torch.Tensor


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Tensor:  # fmt: skip
    """The operator itself, and statistics that its schema does not say it writes.

    mean and variance are over all dimensions but the channels (dimension 1); running values move
    by ``momentum``, the running variance towards the unbiased one.
    """
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if training:
        over = [d for d in range(x.dim()) if d != 1]
        mean = wide.mean(over)
        var = (wide - mean.view(shape)).square().mean(over)
        count = math.prod(x.shape[d] for d in over)
        _move(running_mean, mean, momentum)
        _move(running_var, var * (count / max(count - 1, 1)), momentum)
    else:
        assert running_mean is not None and running_var is not None  # noqa: PT018
        mean, var = running_mean, running_var
    y = (wide - mean.view(shape)) * _inverse_deviation(var, eps).view(shape)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)


def _inverse_deviation(var: Tensor, eps: float) -> Tensor:
    """As the operators have it: 0 where both are 0, with a gradient of 0."""
    if eps == 0:
        var = torch.where(var == 0, torch.inf, var)
    return torch.rsqrt(var + eps)


def _move(running: Tensor | None, new: Tensor, momentum: float) -> None:
    if running is not None:
        running.mul_(1 - momentum).add_(new.detach().to(running.dtype), alpha=momentum)


def instance_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, use_input_stats: bool, momentum: float, eps: float,
    cudnn_enabled: bool,
) -> Tensor:  # fmt: skip
    """A batch norm of each sample alone; running values move by the mean over samples."""
    if not use_input_stats:
        return batch_norm(
            x, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled
        )
    shape = [1, -1] + [1] * (x.dim() - 2)
    over = list(range(2, x.dim()))
    mean = x.mean(over, keepdim=True)
    var = (x - mean).square().mean(over, keepdim=True)
    count = math.prod(x.shape[2:])
    _move(running_mean, mean.flatten(1).mean(0), momentum)
    _move(running_var, var.flatten(1).mean(0) * (count / max(count - 1, 1)), momentum)
    y = (x - mean) * _inverse_deviation(var, eps)
    if weight is not None:
        y = y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def encoder_layer(
    x: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float,
    norm_weight_1: Tensor, norm_bias_1: Tensor, norm_weight_2: Tensor, norm_bias_2: Tensor,
    ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor,
    mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """What nn.TransformerEncoderLayer computes, which runs as one operator without gradients."""

    def norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(y, (embed_dim,), weight, bias, eps)

    def attend(y: Tensor) -> Tensor:
        packed = F.linear(y, qkv_weight, qkv_bias)
        mixed = _attention(packed, num_heads, mask, mask_type)
        return F.linear(mixed, proj_weight, proj_bias)

    def feed_forward(y: Tensor) -> Tensor:
        inner = F.linear(y, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    first, second = (norm_weight_1, norm_bias_1), (norm_weight_2, norm_bias_2)
    if norm_first:
        x = x + attend(norm(x, *first))
        return x + feed_forward(norm(x, *second))
    x = norm(x + attend(x), *first)
    return norm(x + feed_forward(x), *second)


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor,
    qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None,
    need_weights: bool = True, average_attn_weights: bool = True, mask_type: int | None = None,
) -> Any:  # fmt: skip
    """Self-attention of nn.MultiheadAttention without gradients; weights are refused elsewhere."""
    if need_weights or query is not key or key is not value:
        return NotImplemented
    packed = F.linear(query, qkv_weight, qkv_bias)
    mixed = _attention(packed, num_head, mask, mask_type)
    return F.linear(mixed, proj_weight, proj_bias), query.new_empty(0)


def native_layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What tracing below autograd shows of layer_norm; its statistics are rarely read."""
    over = list(range(x.dim() - len(shape), x.dim()))
    mean = x.mean(over, keepdim=True)
    rstd = torch.rsqrt((x - mean).square().mean(over, keepdim=True) + eps)
    return F.layer_norm(x, shape, weight, bias, eps), mean, rstd


def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return torch.softmax(x, dim, dtype=torch.float32 if half_to_float else None)


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return torch.log_softmax(x, dim, dtype=torch.float32 if half_to_float else None)


def _attention(packed: Tensor, heads: int, mask: Tensor | None, mask_type: int | None) -> Tensor:
    """Scaled dot product attention on [B, S, 3 E]."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
    mixed = F.scaled_dot_product_attention(q, k, v, _kept(mask, mask_type))
    return mixed.transpose(1, 2).flatten(2)


def _kept(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    if mask is None:
        return None
    if mask_type == 1:  # [B, S]: padding keys
        mask = mask[:, None, None, :]
    return mask.logical_not()  # the operator reads any number but 0 as "left out"


def as_type(x: Tensor, other: Tensor, non_blocking: bool = False, copy: bool = False) -> Tensor:
    """Only the other's type is read; its shape and values are not operands."""
    return x.to(other.dtype, non_blocking=non_blocking, copy=copy)


def shaped_as(x: Tensor, other: Tensor) -> Tensor:
    """Only the other's sizes are read."""
    return x.reshape(other.shape)


def expanded_as(x: Tensor, other: Tensor) -> Tensor:
    return x.expand(other.shape)


def nearest(x: Tensor, output_size: list[int] | None, scale_factors: list[float] | None) -> Any:
    """Interpolation by whole factors: every element several times."""
    given = list(x.shape[2:])
    sizes = output_size or [int(n * f) for n, f in zip(given, scale_factors or [], strict=True)]
    if len(sizes) != len(given) or any(new % old for new, old in zip(sizes, given, strict=True)):
        return NotImplemented
    for i, (new, old) in enumerate(zip(sizes, given, strict=True)):
        if new != old:
            x = x.repeat_interleave(new // old, 2 + i)
    return x


def drawn_between(x: Tensor, low: int, high: int | None, *, generator: Any = None) -> Tensor:
    """x.random_(low, high), whose overload is named ``from``, which no code can say."""
    if high is None or generator is not None:
        raise CaptureRefused(
            f"x.random_({low}, {high}) on a tensor of shape {tuple(x.shape)} with "
            f"{'no upper end' if high is None else 'a generator of its own'}: no out-of-place "
            "operator draws the same numbers. Do: give both ends and no generator, or use "
            "torch.randint."
        )
    return x.copy_(torch.randint_like(x, low, high))


DEFINITIONS: dict[OpOverload, Callable[..., Any]] = {
    aten.batch_norm.default: batch_norm,
    aten.instance_norm.default: instance_norm,
    aten._transformer_encoder_layer_fwd.default: encoder_layer,
    aten._native_multi_head_attention.default: multi_head_attention,
    aten.native_layer_norm.default: native_layer_norm,
    aten._softmax.default: softmax,
    aten._log_softmax.default: log_softmax,
    aten.reshape_as.default: shaped_as,
    aten.view_as.default: shaped_as,
    aten.expand_as.default: expanded_as,
    aten.type_as.default: as_type,
    aten.to.other: as_type,
    **dict.fromkeys(
        (
            aten.upsample_nearest1d.vec,
            aten.upsample_nearest2d.vec,
            aten.upsample_nearest3d.vec,
            aten._upsample_nearest_exact1d.vec,
            aten._upsample_nearest_exact2d.vec,
            aten._upsample_nearest_exact3d.vec,
        ),
        nearest,
    ),
    getattr(aten.random_, "from"): drawn_between,
    aten.as_strided.default: as_views,
    aten.as_strided_scatter.default: refuse_scatter,
}
