"""The ways in which models spell masks: functions of the lengths and a few inputs.

Each returns what is given to SDPA as ``attn_mask``: boolean (true: attend) or additive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
BATCH, HEADS = 2, 3
BUFFER = torch.ones(64, 64, dtype=torch.bool).tril()
MINUS_INF = torch.full((64, 64), -math.inf).triu(1)


@dataclass(frozen=True, eq=False)
class Spelling:
    """A mask as it is written, the words that ringfx should find for it, and its inputs."""

    mask: Callable[..., Tensor]
    words: str
    inputs: Callable[[int, int], Sequence[Tensor]] = lambda q_len, kv_len: ()
    square: bool = False
    """Whether it makes sense for self-attention only."""


def rows(q_len: int) -> Tensor:
    return torch.arange(q_len)[:, None]


def columns(kv_len: int) -> Tensor:
    return torch.arange(kv_len)[None, :]


def additive(keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, -math.inf)


def documents(q_len: int, kv_len: int) -> Sequence[Tensor]:
    starts = torch.zeros(BATCH, q_len, dtype=torch.int64)
    starts[0, 5] = starts[1, 3] = starts[1, 9] = 1
    return (starts,)


def padding(q_len: int, kv_len: int) -> Sequence[Tensor]:
    kept = torch.ones(BATCH, kv_len, dtype=torch.bool)
    kept[0, -3:] = kept[1, :2] = False
    return (kept,)


def integer_padding(q_len: int, kv_len: int) -> Sequence[Tensor]:
    return (padding(q_len, kv_len)[0].long(),)


def matrix(q_len: int, kv_len: int) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(BATCH, 1, q_len, kv_len, generator=generator) < 0.7,)


def head_table(q_len: int, kv_len: int) -> Sequence[Tensor]:
    return (torch.randn(HEADS, generator=torch.Generator().manual_seed(0)),)


def distance_table(q_len: int, kv_len: int) -> Sequence[Tensor]:
    return (torch.randn(64, HEADS, generator=torch.Generator().manual_seed(0)),)


def same_document(starts: Tensor) -> Tensor:
    number = starts.cumsum(1)
    return number[:, None, :, None] == number[:, None, None, :]


def alibi(q_len: int, kv_len: int) -> Tensor:
    slopes = 2.0 ** -(torch.arange(HEADS) + 1.0)
    distance = columns(kv_len) - rows(q_len)
    return slopes[:, None, None] * distance


SPELLINGS: Mapping[str, Spelling] = {
    "tril of ones": Spelling(lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(), "causal"),
    "tril of float ones": Spelling(lambda q, k: torch.tril(torch.ones(q, k)).bool(), "causal"),
    "a tril buffer, sliced": Spelling(lambda q, k: BUFFER[:q, :k], "a mask given as input"),
    "a -inf buffer, sliced": Spelling(
        lambda q, k: MINUS_INF[:q, :k], "full, bias given as input"
    ),
    "triu of -inf": Spelling(lambda q, k: torch.full((q, k), -math.inf).triu(1), "causal"),
    "not triu": Spelling(lambda q, k: ~torch.ones(q, k, dtype=torch.bool).triu(1), "causal"),
    "rows at least columns": Spelling(lambda q, k: rows(q) >= columns(k), "causal"),
    "columns at most rows": Spelling(lambda q, k: columns(k) <= rows(q), "causal"),
    "columns below rows plus one": Spelling(lambda q, k: columns(k) < rows(q) + 1, "causal"),
    "a difference at least zero": Spelling(lambda q, k: rows(q) - columns(k) >= 0, "causal"),
    "not columns above rows": Spelling(
        lambda q, k: torch.logical_not(columns(k) > rows(q)), "causal"
    ),
    "bottom-right causal": Spelling(
        lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q), "causal"
    ),
    "where": Spelling(
        lambda q, k: torch.where(rows(q) >= columns(k), 0.0, -math.inf), "causal"
    ),
    "masked_fill": Spelling(lambda q, k: additive(rows(q) >= columns(k)), "causal"),
    "window": Spelling(
        lambda q, k: (rows(q) >= columns(k)) & (rows(q) - columns(k) < 4), "causal, window 4"
    ),
    "window by triu": Spelling(
        lambda q, k: torch.ones(q, k, dtype=torch.bool).tril().triu(-3), "causal, window 4"
    ),
    "band": Spelling(lambda q, k: (rows(q) - columns(k)).abs() <= 3, "within 3 tokens"),
    "chunks": Spelling(
        lambda q, k: rows(q) // 4 == columns(k) // 4, "chunks of 4"
    ),
    "chunks, causal": Spelling(
        lambda q, k: (rows(q) // 4 == columns(k) // 4) & (columns(k) <= rows(q)),
        "causal, chunks of 4",
    ),
    "prefix": Spelling(
        lambda q, k: (columns(k) <= rows(q)) | (columns(k) < 5), "causal or first 5 keys"
    ),
    "causal except": Spelling(
        lambda q, k: (columns(k) <= rows(q)) & ~((columns(k) == 2) & (rows(q) > 6)),
        "causal, not (a function of positions and some queries)",
    ),
    "documents": Spelling(
        lambda q, k, starts: same_document(starts), "packed documents", documents, square=True
    ),
    "documents, causal": Spelling(
        lambda q, k, starts: same_document(starts) & (columns(k) <= rows(q)),
        "causal, packed documents",
        documents,
        square=True,
    ),
    "padding": Spelling(lambda q, k, kept: kept[:, None, None, :], "key padding", padding),
    "padding by integers": Spelling(
        lambda q, k, kept: (kept == 1)[:, None, None, :].expand(-1, 1, q, -1), "", integer_padding
    ),
    "padding, causal": Spelling(
        lambda q, k, kept: (columns(k) <= rows(q)) & kept[:, None, None, :],
        "causal, key padding",
        padding,
    ),
    "padding, additive": Spelling(
        lambda q, k, kept: torch.where(kept[:, None, None, :], 0.0, -math.inf),
        "key padding",
        padding,
    ),
    "padding and causal, both additive": Spelling(
        lambda q, k, kept: additive(kept[:, None, None, :]) + additive(columns(k) <= rows(q)),
        "causal, key padding",
        padding,
    ),
    "padding of queries and keys": Spelling(
        lambda q, k, kept: kept[:, None, :, None] & kept[:, None, None, :],
        "query padding, key padding",
        padding,
        square=True,
    ),
    "ALiBi": Spelling(alibi, "full, ALiBi bias"),
    "ALiBi, causal": Spelling(
        lambda q, k: alibi(q, k).masked_fill(columns(k) > rows(q), -math.inf), ""
    ),
    "slopes given": Spelling(
        lambda q, k, slopes: slopes[:, None, None] * (columns(k) - rows(q)),
        "full, ALiBi bias",
        head_table,
    ),
    "a bias for each distance and head": Spelling(
        lambda q, k, table: table[columns(k) - rows(q) + 30].permute(2, 0, 1)[None],
        "full, relative bias",
        distance_table,
    ),
    "a matrix": Spelling(lambda q, k, given: given, "a mask given as input", matrix),
    "a matrix, causal": Spelling(
        lambda q, k, given: given & (columns(k) <= rows(q)), "causal, a mask given as input", matrix
    ),
    "times -1e9": Spelling(
        lambda q, k: (1.0 - (columns(k) <= rows(q)).float()) * -1e9, "causal"
    ),
    "times finfo.min": Spelling(
        lambda q, k, kept: (1.0 - kept[:, None, None, :].float()) * torch.finfo(torch.float32).min,
        "full, key bias",
        padding,
    ),
    "exclusive or": Spelling(lambda q, k: (columns(k) <= rows(q)) ^ (columns(k) == 3), ""),
    "a plane of rows of 4": Spelling(lambda q, k: (rows(q) % 4 - columns(k) % 4).abs() <= 1, ""),
    "everything": Spelling(lambda q, k: torch.ones(q, k, dtype=torch.bool), "full"),
    "zeros added": Spelling(lambda q, k: torch.zeros(q, k), "full"),
    "expanded to heads": Spelling(
        lambda q, k: (columns(k) <= rows(q))[None, None].expand(BATCH, HEADS, q, k), "causal"
    ),
    "stepped buffer": Spelling(
        lambda q, k: (torch.arange(0, 2 * q, 2)[:, None] >= torch.arange(0, 2 * k, 2)), ""
    ),
    "reversed": Spelling(lambda q, k: rows(q) + columns(k) >= k - 1, ""),
}  # fmt: skip
