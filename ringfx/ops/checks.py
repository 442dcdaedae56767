"""Guards of the attention operator: every error a wrong call can meet, said before any message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ringfx.comm.process_group import Ranks
from ringfx.errors import InvalidArgument, StrategyRefused
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import Layout, LayoutKind
from ringfx.ir.tiles import CAUSAL, own_rows
from ringfx.ir.values import AttentionSite
from ringfx.ops.tiling import bias_gradients as bias_gradient_rules
from ringfx.strategies import Strategy

__all__ = ["bias_gradients", "layout_kind", "runs", "seed", "shapes", "sinks", "tensors"]

Tensor = torch.Tensor


def layout_kind(layout: str, layer: str) -> LayoutKind:
    if layout == "contiguous":
        return "contiguous"
    if layout == "zigzag":
        return "zigzag"
    raise InvalidArgument(
        f"{_where(layer)}: layout is {layout!r}. Do: use 'contiguous' or 'zigzag'."
    )


def tensors(given: Mapping[str, object], layer: str) -> None:
    """Dense floating tensors on one device, none of them empty."""
    where, devices = _where(layer), set()
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise InvalidArgument(
                f"{where}: {name} is a {type(x).__name__}. Do: pass a torch.Tensor."
            )
        if x.layout != torch.strided or not x.is_floating_point():
            raise InvalidArgument(
                f"{where}: {name} is {x.dtype}, {x.layout}. Do: pass a dense floating tensor."
            )
        if not x.numel():
            raise InvalidArgument(
                f"{where}: {name} {tuple(x.shape)} is empty. Do: pass tokens and heads, 1 or more."
            )
        devices.add(str(x.device))
    if len(devices) > 1:
        raise InvalidArgument(
            f"{where}: {', '.join(given)} are on {', '.join(sorted(devices))}. "
            "Do: move them to one device."
        )


def shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    layout: LayoutKind,
    ranks: Ranks,
    *,
    whole_queries: bool = False,
) -> None:
    """q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E] with the lengths that the layout gives."""
    where = _where(ranks.layer)
    if spec.branches and (
        spec.keep not in (None, CAUSAL) or spec.bias or spec.dropout or spec.q_len != spec.kv_len
    ):
        raise InvalidArgument(
            f"{where}: dilated attention of {spec.q_len} queries over {spec.kv_len} keys, with "
            f"{spec.words}. Do: use it without a mask, bias or dropout, or causal, over one "
            "sequence."
        )
    found = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise InvalidArgument(f"{where}: {found}. Do: pass [batch, heads, tokens, head dim].")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise InvalidArgument(
            f"{where}: q is {q.dtype}, k {k.dtype}, v {v.dtype}. "
            "Do: cast them to one floating-point type."
        )
    agree = q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]
    if not agree or q.shape[3] != k.shape[3]:
        raise InvalidArgument(
            f"{where}: {found}. Do: give all one batch size, k and v one number of heads and "
            "tokens, q and k one head dim."
        )
    if q.shape[1] % k.shape[1]:
        raise InvalidArgument(
            f"{where}: {q.shape[1]} query heads for {k.shape[1]} key/value heads. "
            "Do: use a number of query heads that the key/value heads divide."
        )
    for what, tensor, length in (("q", q, spec.q_len), ("k", k, spec.kv_len)):
        is_whole = whole_queries and what == "q"
        local = length if is_whole else Layout(layout, length, ranks.size).local_length
        if tensor.shape[2] != local:
            raise InvalidArgument(
                f"{where}: {what} has {tensor.shape[2]} tokens on rank {ranks.rank}; {length} "
                f"tokens in {layout} layout over {ranks.size} ranks are {local} on each. "
                "Do: split the whole tensor with ringfx.ops.shard, and pass the true length."
            )


def runs(
    strategy: Strategy, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, ranks: Ranks
) -> None:
    """What, on several ranks, the strategy cannot do."""
    if ranks.size == 1:
        return
    refusal = strategy.admits(_site(q, k, v, spec, ranks), ranks.size)
    if refusal is not None:
        raise StrategyRefused(f"{_where(ranks.layer)}: {refusal.reason}. Do: {refusal.remedy}.")


def _site(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, ranks: Ranks) -> AttentionSite:
    """The call as strategies are asked about it, as far as it is known here."""
    return AttentionSite(
        node="", name=ranks.layer, source="", found_by="call", spec=spec, mask_words="",
        density=1.0, balanced=spec.keep is None, batch=q.shape[0], heads=q.shape[1],
        kv_heads=k.shape[1], head_dim=q.shape[3], v_head_dim=v.shape[3],
        dtype=str(q.dtype).removeprefix("torch."), device=q.device.type, trains=False,
        row_bytes=len(own_rows(*spec.functions)),
    )  # fmt: skip


def sinks(inputs: Sequence[Tensor], heads: int, layer: str) -> Tensor:
    """The sinks, one logit a head, which are the last captured tensor."""
    found = tuple(inputs[-1].shape) if inputs else None
    if found != (heads,):
        raise InvalidArgument(
            f"{_where(layer)}: sinks have shape {found}; here are {heads} heads. "
            f"Do: pass one logit a head, shape ({heads},)."
        )
    return inputs[-1]


def seed(inputs: Sequence[Tensor], batch: int, spec: AttentionSpec, layer: str) -> Tensor:
    """The seed of a dropout, which is the very last captured tensor; behind it the numbers that the
    entries of the batch have among all, if they are only a part."""
    last = inputs[-1] if inputs else None
    if last is None or last.dtype != torch.int64 or last.numel() not in (1, 1 + batch):
        found = "no tensor" if last is None else f"{last.dtype} {tuple(last.shape)}"
        raise InvalidArgument(
            f"{_where(layer)}: dropout {spec.dropout:g} with {found} as its seed. "
            "Do: pass one int64 as the last input, the same on every rank."
        )
    return last.reshape(-1)


def bias_gradients(spec: AttentionSpec, wanted: Sequence[int], layer: str) -> None:
    """Gradients can flow to captured tensors through the bias and the score map only."""
    for expr in (spec.bias, spec.score_map):
        if expr is not None:
            bias_gradient_rules.refuse_unsupported(expr, wanted, layer)


def _where(layer: str) -> str:
    return layer or "attention"
