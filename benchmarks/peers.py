"""What others do on the same ranks, for the comparison in ``benchmarks.attention``.

    torch ring   torch's context-parallel ring template, given the kernel of the CPU
    all-to-all   Ulysses from ``all_to_all_single``: heads for tokens, the fused kernel, and back
    all-gather   K and V gathered whole, the fused kernel on the rank's own rows

Each is a function of a rank's own q, k, v, [1, heads, tokens, head dim], zigzag where causal, and
has a backward; all give the right output and gradients (``tests/test_benchmarks.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor.experimental._context_parallel import _attention as template

from ringfx.ir.layout import Layout

__all__ = ["PEERS"]

Tensor: TypeAlias = torch.Tensor
aten = torch.ops.aten


def _kernel(query: Tensor, key: Tensor, value: Tensor, **given: object) -> tuple[Tensor, Tensor]:
    return _flash(query, key, value, bool(given["is_causal"]))


def _flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    found = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal)
    return cast("tuple[Tensor, Tensor]", found)


def _kernel_backward(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, ...]:
    return _flash_backward(query=query, key=key, value=value, **given)


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, 0.0, is_causal
    )
    return cast("tuple[Tensor, Tensor, Tensor]", found)


class _TorchRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        _balance(causal)
        out, lse = template._templated_ring_attention(
            _group(), 2, _kernel, q, k, v, is_causal=causal
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        _balance(ctx.causal)
        q, k, v, out, lse = ctx.saved_tensors
        grads = template._templated_ring_attention_backward(
            _group(), 2, _kernel_backward, dout, "grad_out", q, k, v, out, lse, ctx.causal
        )
        return *grads[:3], None


def _balance(causal: bool) -> None:
    template._cp_options.enable_load_balance = causal
    template._cp_options.rotate_method = template._RotateMethod.ALL_TO_ALL


def _group() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "the benchmark starts it"
    return world


class _HeadsForTokens(torch.autograd.Function):
    """[1, H, Q, D] of the own tokens -> [1, H/p, S, D] of all, in rank order; or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: bool) -> Tensor:
        ctx.back = back
        return _exchanged(x, back)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return _exchanged(dx, not ctx.back), None


def _exchanged(x: Tensor, back: bool) -> Tensor:
    size = dist.get_world_size()
    parts = torch.stack(x.chunk(size, dim=2 if back else 1)).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return torch.cat(list(received.unbind(0)), dim=1 if back else 2)


def _all_to_all(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    order = None
    if causal:
        size = dist.get_world_size()
        order = Layout("zigzag", q.shape[2] * size, size).order()
    whole = [_HeadsForTokens.apply(x, False) for x in (q, k, v)]  # type: ignore[no-untyped-call]
    if order is not None:
        whole = [x.index_select(2, order) for x in whole]
    q, k, v = whole
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if order is not None:
        out = out.index_select(2, order.argsort())
    return cast("Tensor", _HeadsForTokens.apply(out, True))  # type: ignore[no-untyped-call]


class _Gathered(torch.autograd.Function):
    """Tokens of all ranks in the order of the sequence; backward, a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, causal: bool) -> Tensor:
        size = dist.get_world_size()
        parts = x.new_empty(size, *x.shape)
        dist.all_gather_into_tensor(parts.view(-1), x.reshape(-1))
        whole = torch.cat(list(parts.unbind(0)), dim=2)
        ctx.causal = causal
        return whole.index_select(2, _order(whole.shape[2])) if causal else whole

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.causal:
            dx = dx.index_select(2, _order(dx.shape[2]).argsort())
        parts = torch.stack(dx.chunk(dist.get_world_size(), dim=2))
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(mine.view(-1), parts.view(-1))
        return mine, None


def _order(length: int) -> Tensor:
    return Layout("zigzag", length, dist.get_world_size()).order()


def _all_gather(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    k, v = (cast("Tensor", _Gathered.apply(x, causal)) for x in (k, v))  # type: ignore[no-untyped-call]
    if not causal:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    layout = Layout("zigzag", k.shape[2], dist.get_world_size())
    parts = []
    for start, rows in zip(layout.chunk_starts(dist.get_rank()), q.chunk(2, dim=2), strict=True):
        stop = start + rows.shape[2]
        parts.append(_Rows.apply(rows, k[:, :, :stop], v[:, :, :stop]))  # type: ignore[no-untyped-call]
    return torch.cat(parts, 2)


class _Rows(torch.autograd.Function):
    """Rows at the end of a causal sequence: full over what is before, causal over themselves."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = k.shape[2] - q.shape[2]
        merger = template._SDPAMerger(True, seq_dim=2)
        merger.step(*_flash(q, k[:, :, first:], v[:, :, first:], True), False)
        if first:
            merger.step(*_flash(q, k[:, :, :first], v[:, :, :first], False), False)
        out, lse = merger.results()
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        first = k.shape[2] - q.shape[2]
        dq, dk, dv = _flash_backward(dout, q, k[:, :, first:], v[:, :, first:], out, lse, True)
        if first:
            before = _flash_backward(dout, q, k[:, :, :first], v[:, :, :first], out, lse, False)
            dq = dq + before[0]
            dk, dv = torch.cat([before[1], dk], 2), torch.cat([before[2], dv], 2)
        return dq, dk, dv


def _torch_ring(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return cast("Tensor", _TorchRing.apply(q, k, v, causal))  # type: ignore[no-untyped-call]


PEERS: Mapping[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    "torch ring": _torch_ring,
    "all-to-all": _all_to_all,
    "all-gather": _all_gather,
}
