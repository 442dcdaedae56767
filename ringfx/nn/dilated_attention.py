"""Self-attention with LongNet's dilated pattern, as a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ringfx.errors import InvalidArgument
from ringfx.ops.dilated import check_branches, dilated_spec
from ringfx.ops.operator import attention
from ringfx.strategies import DEFAULT
from ringfx.validation.arguments import switch, whole_number

__all__ = ["DilatedAttention"]

Tensor = torch.Tensor


class DilatedAttention(nn.Module):
    """Multi-head self-attention in segments with dilation (LongNet, arXiv 2307.02486).

    The forward takes and gives [batch, tokens, embed_dim]. On one rank, or inside a model that
    ``ringfx.optimize`` splits, the tokens are those of the whole sequence.

    Parameters
    ----------
    embed_dim
        Width of a token; num_heads divides it.
    num_heads
        Heads of queries. Each runs all branches.
    segment_lengths, dilation_rates
        One number for each branch; see ``ringfx.ops.dilated_attention``.
    causal
        Whether a token attends earlier ones only.
    num_kv_heads
        Heads of keys and values, by default as many as of queries; they divide num_heads.
    bias
        Whether the four projections have a bias.

    Examples
    --------
    >>> layer = DilatedAttention(32, 4, [8, 16], [1, 2])
    >>> layer(torch.zeros(1, 20, 32)).shape
    torch.Size([1, 20, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        causal: bool = False,
        num_kv_heads: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        self.embed_dim = whole_number(where, "embed_dim", embed_dim)
        self.num_heads = whole_number(where, "num_heads", num_heads)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.num_kv_heads = whole_number(where, "num_kv_heads", kv_heads)
        for name, size, by in (
            ("embed_dim", self.embed_dim, self.num_heads),
            ("num_heads", self.num_heads, self.num_kv_heads),
        ):
            if size % by:
                raise InvalidArgument(
                    f"{where}: {name} is {size}, which {by} heads do not divide. "
                    "Do: choose numbers of heads that divide."
                )
        check_branches(where, segment_lengths, dilation_rates)
        switch(where, "causal", causal)
        switch(where, "bias", bias)
        self.segment_lengths, self.dilation_rates = tuple(segment_lengths), tuple(dilation_rates)
        self.causal = causal
        kv_dim = self.embed_dim // self.num_heads * self.num_kv_heads
        made = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim, **made)  # type: ignore[arg-type]
        self.k_proj = nn.Linear(self.embed_dim, kv_dim, **made)  # type: ignore[arg-type]
        self.v_proj = nn.Linear(self.embed_dim, kv_dim, **made)  # type: ignore[arg-type]
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim, **made)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise InvalidArgument(
                f"{type(self).__name__}: x has the shape {tuple(x.shape)}. "
                f"Do: pass [batch, tokens, {self.embed_dim}]."
            )
        q, k, v = (
            projection(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_kv_heads),
                (self.v_proj, self.num_kv_heads),
            )
        )
        spec = dilated_spec(
            scale=1.0 / math.sqrt(q.shape[3]), length=x.shape[1], causal=self.causal,
            segments=self.segment_lengths, rates=self.dilation_rates,
        )  # fmt: skip
        out = attention(q, k, v, (), spec=spec, strategy=DEFAULT, layout="contiguous", group="")
        merged: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return merged

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, segment_lengths="
            f"{list(self.segment_lengths)}, dilation_rates={list(self.dilation_rates)}, "
            f"causal={self.causal}"
        )
