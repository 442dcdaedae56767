"""Dilated attention called by hand, on a rank's own tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from ringfx.comm.group_argument import Group, name_and_size
from ringfx.errors import InvalidArgument
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.dilation import Branch
from ringfx.ir.layout import LayoutKind
from ringfx.ir.tiles import CAUSAL
from ringfx.ir.values import AttentionSite
from ringfx.ops import checks
from ringfx.ops.automatic import AUTO, fastest
from ringfx.ops.operator import attention
from ringfx.strategies import STRATEGIES
from ringfx.torch_compat.dynamo_marks import constant_result
from ringfx.validation.arguments import choice, number, switch, text, whole_number

__all__ = ["check_branches", "dilated_attention", "dilated_spec"]

Tensor = torch.Tensor

OPERATION = "dilated_attention"


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    causal: bool = False,
    scale: float | None = None,
    strategy: str = AUTO,
    layout: LayoutKind = "contiguous",
    length: int | None = None,
    group: Group = None,
    name: str = "",
) -> Tensor:
    """LongNet's dilated attention over tokens that are split between ranks.

    In branch i the sequence is cut into segments of ``segment_lengths[i]`` tokens. In each segment
    head j keeps the rows j mod r, j mod r + r, ... with r = ``dilation_rates[i]``, and attends
    among them. The branches are merged by the denominators of their softmaxes (arXiv 2307.02486,
    equations 10 and 11). Positions are those of the whole sequence, so the result does not depend
    on the number of ranks. Call it on every rank of the group.

    Parameters
    ----------
    q, k, v
        This rank's tokens, [batch, heads, tokens, head dim]; k and v may have fewer heads (grouped
        queries), v another head dim. See ``ringfx.ops.shard``.
    segment_lengths, dilation_rates
        One number for each branch. The last segment of a sequence may be shorter.
    causal
        Query i attends the kept keys of its segment up to its own.
    scale
        Multiplies q k^T; 1/sqrt(head dim) by default.
    strategy
        ``simple``, ``collective``, ``production`` or ``ulysses``; ``auto`` takes the one that is
        predicted to be fastest, and the same on all ranks.
    layout
        How tokens lie on the ranks, ``contiguous`` or ``zigzag``.
    length
        True number of tokens over all ranks; by default all that the shards hold.
    group
        A process group, a device mesh of one dim, or None for all ranks.
    name
        The layer's name, for error texts.

    Returns
    -------
    Tensor
        [batch, heads, tokens, head dim of v] in q's dtype. A row that no branch keeps is 0.

    Raises
    ------
    InvalidArgument
        Shapes, lengths, segments or rates that do not fit together.
    StrategyRefused
        The strategy cannot run here, such as ulysses where heads do not divide.
    CommunicationError
        A rank did not answer within the group's timeout.

    >>> q, k, v = torch.ones(3, 1, 4, 8, 16).unbind()
    >>> dilated_attention(q, k, v, segment_lengths=[4, 8], dilation_rates=[1, 2]).shape
    torch.Size([1, 4, 8, 16])
    """
    text(OPERATION, "name", name)
    where = name or OPERATION
    checks.tensors({"q": q, "k": k, "v": v}, where)
    switch(where, "causal", causal)
    choice(where, "strategy", strategy, (AUTO, *STRATEGIES))
    choice(where, "layout", layout, ("contiguous", "zigzag"))
    if scale is not None:
        number(where, "scale", scale)
    if not q.dim() == k.dim() == v.dim() == 4:
        raise InvalidArgument(
            f"{where}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}. "
            "Do: pass [batch, heads, tokens on this rank, head dim]."
        )
    if q.shape[2] != k.shape[2]:
        raise InvalidArgument(
            f"{where}: q has {q.shape[2]} tokens, k {k.shape[2]}. Dilated attention is self-"
            "attention: queries and keys are rows of one sequence. Do: pass q and k of one length."
        )
    check_branches(where, segment_lengths, dilation_rates)
    group_name, size = name_and_size(group)
    spec = dilated_spec(
        scale=1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
        length=q.shape[2] * size if length is None else whole_number(where, "length", length),
        causal=causal,
        segments=tuple(segment_lengths),
        rates=tuple(dilation_rates),
    )
    if strategy == AUTO:
        strategy = _fastest(
            spec, layout, tuple(q.shape), tuple(k.shape), v.shape[3], q.dtype, q.device.type,
            needs_gradient=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
            where=where, group=group_name, size=size,
        )  # fmt: skip
    return attention(
        q, k, v, (),
        spec=spec, strategy=strategy, layout=layout, group=group_name, name=name or OPERATION,
    )  # fmt: skip


@constant_result
def _fastest(
    spec: str,
    layout: LayoutKind,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_head_dim: int,
    dtype: torch.dtype,
    device: str,
    *,
    needs_gradient: bool,
    where: str,
    group: str,
    size: int,
) -> str:
    """Sizes instead of tensors, so that it can be asked while a compiler traces."""
    site = AttentionSite(
        node="", name=where, source="", found_by="call", spec=AttentionSpec.from_json(spec),
        mask_words="", density=1.0, balanced=layout == "contiguous", batch=q_shape[0],
        heads=q_shape[1], kv_heads=k_shape[1], head_dim=q_shape[3], v_head_dim=v_head_dim,
        dtype=str(dtype).removeprefix("torch."), device=device, trains=needs_gradient,
    )  # fmt: skip
    return fastest(site, group, size)


def check_branches(where: str, segments: Sequence[int], rates: Sequence[int]) -> None:
    """Segments and rates, one of each for every branch.

    Raises
    ------
    InvalidArgument
        Lists of different or no length, numbers below 1, segments that shrink while rates grow.
    """
    for name, given in (("segment_lengths", segments), ("dilation_rates", rates)):
        if not isinstance(given, list | tuple) or not given:
            raise InvalidArgument(
                f"{where}: {name} is {given!r}. Do: pass a list with one number for each branch."
            )
        for i, number_ in enumerate(given):
            whole_number(where, f"{name}[{i}]", number_)
    if len(segments) != len(rates):
        raise InvalidArgument(
            f"{where}: {len(segments)} segment_lengths {list(segments)}, {len(rates)} "
            f"dilation_rates {list(rates)}. Do: pass one of each for every branch."
        )
    pairs = list(zip(segments, rates, strict=True))
    for (segment, rate), (next_segment, next_rate) in itertools.pairwise(pairs):
        if next_rate > rate and next_segment < segment:
            raise InvalidArgument(
                f"{where}: rate {next_rate} after {rate}, but segment {next_segment} after "
                f"{segment}. Do: let segments grow with their rates."
            )


@constant_result
def dilated_spec(
    *, scale: float, length: int, causal: bool, segments: Sequence[int], rates: Sequence[int]
) -> str:
    """A dilated ``AttentionSpec`` as JSON, made outside of what a compiler traces."""
    branches = tuple(Branch(segment=w, rate=r) for w, r in zip(segments, rates, strict=True))
    keep = CAUSAL if causal else None
    return AttentionSpec(
        scale=scale, q_len=length, kv_len=length, keep=keep, branches=branches
    ).to_json()
