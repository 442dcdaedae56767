"""Ring attention called by hand, on a rank's own tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ringfx.comm.group_argument import Group, name_and_size
from ringfx.errors import InvalidArgument
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.layout import LayoutKind
from ringfx.ir.tiles import CAUSAL, Expr, K, Q, conjunction, inputs_used
from ringfx.ir.tiles.checked import checked_expr
from ringfx.ops import checks
from ringfx.ops.kernels.dropout import SEEDS
from ringfx.ops.operator import attention
from ringfx.strategies import DEFAULT, STRATEGIES, Strategy
from ringfx.strategies.keys import key_of
from ringfx.torch_compat.dynamo_marks import constant_result
from ringfx.validation.arguments import choice, number, switch, tensor, text, whole_number

__all__ = ["ring_attention"]

Tensor = torch.Tensor


NAMES = tuple(STRATEGIES)
CHOICES = {"layout": ("contiguous", "zigzag"), "fully_masked": ("zero", "mean")}


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    strategy: str | Strategy = DEFAULT,
    causal: bool = False,
    scale: float | None = None,
    layout: LayoutKind = "contiguous",
    length: int | None = None,
    kv_length: int | None = None,
    window: int | None = None,
    prefix: int | None = None,
    documents: Tensor | None = None,
    key_padding: Tensor | None = None,
    keep: Expr | None = None,
    bias: Expr | None = None,
    inputs: Sequence[Tensor] = (),
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    fully_masked: Literal["zero", "mean"] = "zero",
    group: Group = None,
    name: str = "",
) -> Tensor:
    """Attention over tokens that are split between ranks; call it on every rank of the group.

    Parameters
    ----------
    q, k, v
        This rank's tokens as ``scaled_dot_product_attention`` has them: [batch, heads, tokens,
        head dim]; k and v may have fewer heads (grouped queries), v another head dim. See
        ``ringfx.ops.shard``.
    strategy
        A name of ``ringfx.STRATEGIES``, or a strategy of your own.
    causal
        Query i attends keys 0..i.
    scale
        Multiplies q k^T; 1/sqrt(head dim) by default.
    layout
        How tokens lie on the ranks; ``zigzag`` balances causal attention.
    length, kv_length
        True number of queries and keys over all ranks; by default all that the shards hold, and
        ``kv_length`` is ``length`` where k is as long as q. Keys beyond are masked.
    window
        Query i attends keys j with i - window < j, and j < i + window if not causal.
    prefix
        The first keys, which every query attends whatever ``causal`` and ``window`` say.
    documents
        Whole, integer, [tokens] or [batch, tokens]: tokens attend those of equal number.
    key_padding
        Whole, bool, [keys] or [batch, keys]: False keys are not attended.
    keep, bias, inputs
        Tile functions (see ``ringfx.tiles``) and the whole tensors they read; ``keep`` adds to the
        masks above. Gradients of floating inputs of the bias are complete on every rank.
    soft_cap
        Scores become soft_cap * tanh(score / soft_cap).
    sinks
        [heads], one logit a head that joins the softmax and attends nothing.
    dropout
        Share of the attention weights that are dropped, below 1; the others count 1/(1 - dropout).
    seed
        Of the dropout: a number, or int64 of one element, the same on every rank and another one in
        each step. It decides with the batch entry, head, query and key which weights are dropped:
        the same on any number of ranks.
    fully_masked
        What a query without any key gives: zero as SDPA, or the mean of v.
    group
        A process group, a device mesh of one dim, or None for all ranks.
    name
        The layer's name, for error texts.

    Returns
    -------
    Tensor
        [batch, heads, tokens, head dim of v] in q's dtype; padded tokens are 0.

    Raises
    ------
    InvalidArgument
        Shapes, dtypes or lengths that do not fit together.
    StrategyRefused
        The strategy cannot run here, such as ulysses where heads do not divide.
    CommunicationError
        A rank did not answer within the group's timeout.

    >>> q, k, v = torch.ones(3, 1, 2, 4, 8).unbind()
    >>> ring_attention(q, k, v, causal=True).shape
    torch.Size([1, 2, 4, 8])
    """
    text("ring_attention", "name", name)
    where = name or "ring_attention"
    checks.tensors({"q": q, "k": k, "v": v}, where)
    _check_options(where, causal=causal, scale=scale, layout=layout, fully_masked=fully_masked)
    _check_options(where, soft_cap=soft_cap)
    key = _key(where, strategy)
    _check_numbers(where, length=length, kv_length=kv_length, window=window, prefix=prefix)
    _check_read(where, documents=documents, key_padding=key_padding, sinks=sinks)
    _check_tile_functions(where, inputs, keep=keep, bias=bias)
    _check_dropout(where, dropout, seed)
    if not q.dim() == k.dim() == v.dim() == 4:
        raise InvalidArgument(
            f"ring_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}. "
            "Do: pass [batch, heads, tokens on this rank, head dim]."
        )
    group_name, size = name_and_size(group)
    q_len = q.shape[2] * size if length is None else length
    if kv_length is None:
        kv_length = q_len if k.shape[2] == q.shape[2] else k.shape[2] * size
    captured = _Captured(list(inputs))
    band = _band(causal, window, prefix)
    spec = _spec_text(
        scale=1.0 / math.sqrt(q.shape[3]) if scale is None else scale,
        q_len=q_len,
        kv_len=kv_length,
        keep=conjunction(
            band,
            captured.documents(documents, q_len, kv_length),
            captured.key_padding(key_padding, kv_length),
            keep,
        ),
        bias=bias,
        soft_cap=soft_cap,
        sinks=sinks is not None,
        dropout=float(dropout),
        fully_masked=fully_masked,
    )
    if sinks is not None:
        captured.tensors.append(sinks)
    if dropout:
        captured.tensors.append(torch.as_tensor(seed, dtype=torch.int64).reshape(1) % SEEDS)
    return attention(
        q,
        k,
        v,
        captured.tensors,
        spec=spec,
        strategy=key,
        layout=layout,
        group=group_name,
        name=name or "ring_attention",
    )


def _check_options(where: str, **given: Any) -> None:
    for name, value in given.items():
        if name in CHOICES:
            choice(where, name, value, CHOICES[name])
        elif name == "causal":
            switch(where, name, value)
        elif value is not None:
            number(where, name, value, positive=name == "soft_cap")


def _check_numbers(where: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            whole_number(where, name, value, least=0 if name == "prefix" else 1)


def _check_read(where: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            tensor(where, name, value)
            if name == "sinks" and not value.is_floating_point():
                raise InvalidArgument(f"{where}: sinks is {value.dtype}. Do: pass floats.")
            if name == "documents" and (value.is_floating_point() or value.is_complex()):
                raise InvalidArgument(f"{where}: documents is {value.dtype}. Do: pass integers.")


def _check_dropout(where: str, dropout: Any, seed: Any) -> None:
    number(where, "dropout", dropout)
    if not 0 <= dropout < 1:
        raise InvalidArgument(f"{where}: dropout is {dropout}. Do: pass 0 or more, below 1.")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            found = f"{seed.dtype} {tuple(seed.shape)}"
            raise InvalidArgument(f"{where}: seed is {found}. Do: pass a number or one int64.")
    elif seed is not None:
        whole_number(where, "seed", seed, least=0, most=SEEDS - 1)
    elif dropout:
        raise InvalidArgument(
            f"{where}: dropout {dropout:g} without a seed. Do: pass seed=, a number or one int64, "
            "the same on every rank and another one in each step."
        )


def _check_tile_functions(where: str, inputs: Sequence[Tensor], **given: Any) -> None:
    if not isinstance(inputs, list | tuple):
        raise InvalidArgument(f"{where}: inputs is a {type(inputs).__name__}. Do: pass a list.")
    for i, x in enumerate(inputs):
        tensor(where, f"inputs[{i}]", x)
    for name, value in given.items():
        if value is not None and (problem := _problem(value, len(inputs))):
            raise InvalidArgument(f"{where}: {name}: {problem}. Do: see ringfx.tiles.")


def _key(where: str, strategy: str | Strategy) -> str:
    """By which the operator finds the strategy."""
    if isinstance(strategy, Strategy):
        return _own_key(strategy)
    choice(where, "strategy", strategy, NAMES)
    return strategy


@constant_result
def _own_key(strategy: Strategy) -> str:
    """Looked up outside of what a compiler traces."""
    return key_of(strategy)


@constant_result
def _problem(expr: Any, num_inputs: int) -> str:
    """What is wrong with a tile function; empty if nothing is."""
    try:
        used = inputs_used(checked_expr(expr))
    except ValueError as error:
        return str(error)
    beyond = [i for i in used if i >= num_inputs]
    return f"it reads input {beyond[0]}, and there are {num_inputs} inputs" if beyond else ""


@constant_result
def _spec_text(**fields: Any) -> str:
    """Written as JSON outside of what a compiler traces."""
    return AttentionSpec(**fields).to_json()


def _band(causal: bool, window: int | None, prefix: int | None) -> Expr | None:
    parts: list[Expr | None] = [CAUSAL if causal else None]
    if window is not None:
        if window < 1:
            raise InvalidArgument(f"ring_attention: window is {window}. Do: use 1 or more.")
        parts.append(("gt", K, ("sub", Q, ("const", window))))
        if not causal:
            parts.append(("lt", K, ("add", Q, ("const", window))))
    band = conjunction(*parts)
    if band is None or prefix is None:
        return band
    return ("or", ("lt", K, ("const", prefix)), band)


@dataclass(frozen=True)
class _Captured:
    """The tensors that the tile functions read, in the order of their numbers."""

    tensors: list[Tensor] = field(default_factory=list)

    def _vector(self, what: str, x: Tensor, length: int) -> int:
        """Adds a whole [tokens] or [batch, tokens]; its number."""
        if x.dim() not in (1, 2) or x.shape[-1] != length:
            raise InvalidArgument(
                f"ring_attention: {what} has shape {tuple(x.shape)}, the sequence {length} tokens. "
                "Do: pass the whole [tokens] or [batch, tokens], not this rank's part."
            )
        self.tensors.append(x)
        return len(self.tensors) - 1

    def _at(self, position: int, token: Expr) -> Expr:
        shape = self.tensors[position].shape
        if len(shape) == 1:
            return ("at", position, token)
        return ("at", position, ("const", 0) if shape[0] == 1 else ("b",), token)

    def documents(self, ids: Tensor | None, q_len: int, kv_len: int) -> Expr | None:
        if ids is None:
            return None
        if q_len != kv_len:
            raise InvalidArgument(
                f"ring_attention: documents with {q_len} queries and {kv_len} keys. "
                "Do: use keep and inputs for documents across two sequences."
            )
        position = self._vector("documents", ids, q_len)
        return ("eq", self._at(position, Q), self._at(position, K))

    def key_padding(self, kept: Tensor | None, kv_len: int) -> Expr | None:
        if kept is None:
            return None
        if kept.dtype != torch.bool:
            raise InvalidArgument(
                f"ring_attention: key_padding is {kept.dtype}. Do: pass bool, True for real keys."
            )
        return self._at(self._vector("key_padding", kept, kv_len), K)
