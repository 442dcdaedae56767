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


def bloom_alibi(q_len: int, kv_len: int, kept: Tensor) -> Tensor:
    """Bloom's: slopes times the number of tokens seen, as [batch * heads, 1, keys]."""
    closest = 2 ** math.floor(math.log2(HEADS))
    base = torch.tensor(2 ** (-(2 ** -(math.log2(closest) - 3))), dtype=torch.float32)
    slopes = torch.pow(base, torch.arange(1, 1 + closest, dtype=torch.int32))
    extra = torch.tensor(2 ** (-(2 ** -(math.log2(2 * closest) - 3))), dtype=torch.float32)
    more = torch.pow(extra, torch.arange(1, 1 + 2 * (HEADS - closest), 2, dtype=torch.int32))
    slopes = torch.cat([slopes, more], dim=0)
    places = ((kept.cumsum(dim=-1) - 1) * kept)[:, None, :]
    found = slopes[..., None] * places
    flat = found.reshape(kept.shape[0] * HEADS, 1, kept.shape[1])
    return flat.view(kept.shape[0], HEADS, 1, kept.shape[1])


def mpt_alibi(q_len: int, kv_len: int) -> Tensor:
    """MPT's: distances to the last key, and a causal mask filled with finfo.min."""
    bias = torch.arange(1 - kv_len, 1, dtype=torch.int32).view(1, 1, 1, kv_len)
    base = torch.arange(1, 5, dtype=torch.int64).float() * (8 / 4)
    slopes = (1.0 / torch.pow(2, base)).view(1, 4, 1, 1)
    slopes = torch.concat([slopes[:, 1::2, ...], slopes[:, ::2, ...]], dim=1)[:, :HEADS, ...]
    future = torch.ones(q_len, kv_len, dtype=torch.bool).triu(kv_len - q_len + 1)
    return (bias * slopes).masked_fill(future, torch.finfo(torch.float32).min)


def t5_buckets(distance: Tensor, both: bool, buckets: int = 8, furthest: int = 16) -> Tensor:
    found = torch.zeros_like(distance)
    if both:
        buckets //= 2
        found += (distance > 0).to(torch.long) * buckets
        distance = torch.abs(distance)
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    exact = buckets // 2
    far = exact + (
        torch.log(distance.float() / exact) / math.log(furthest / exact) * (buckets - exact)
    ).to(torch.long)
    far = torch.min(far, torch.full_like(far, buckets - 1))
    found += torch.where(distance < exact, distance, far)
    return found


def t5_bias(q_len: int, kv_len: int, table: Tensor, both: bool = True) -> Tensor:
    buckets = t5_buckets(columns(kv_len) - rows(q_len), both)
    return torch.nn.functional.embedding(buckets, table).permute([2, 0, 1]).unsqueeze(0)


def deberta_bias(q_len: int, kv_len: int, per_query: Tensor) -> Tensor:
    """What each query says of each bucket of distances, read at the bucket of a key."""
    span = 8
    distance = rows(q_len) - columns(kv_len)
    middle = span // 2
    inside = torch.where((distance < middle) & (distance > -middle), middle - 1, distance.abs())
    far = (
        torch.ceil(torch.log(inside / middle) / math.log((16 - 1) / middle) * (middle - 1)) + middle
    )
    bucket = torch.where(inside <= middle, distance.float(), far * distance.sign()).long()
    place = torch.clamp(bucket[None, None] + span, 0, 2 * span - 1)
    return torch.gather(per_query, -1, place.expand(BATCH, HEADS, -1, -1))


def query_table(q_len: int, kv_len: int) -> Sequence[Tensor]:
    return (torch.randn(BATCH, HEADS, q_len, 16, generator=torch.Generator().manual_seed(0)),)


def plane_bias(q_len: int, kv_len: int, table: Tensor) -> Tensor:
    """Swin's: tokens of a plane of rows of 4, a bias for each offset in two directions."""

    def offset(q: Tensor, k: Tensor) -> Tensor:
        return (q - k).clamp(-3, 3) + 3

    across = offset(rows(q_len) % 4, columns(kv_len) % 4)
    down = offset(rows(q_len) // 4, columns(kv_len) // 4)
    place = (down * 7 + across).view(-1)
    return table[place].view(q_len, kv_len, -1).permute(2, 0, 1).contiguous()[None]


def block_layout(q_len: int, kv_len: int) -> Sequence[Tensor]:
    return (torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) < 0.6,)


def blocks(q_len: int, kv_len: int, layout: Tensor) -> Tensor:
    """Blocks of the layout that are kept, each repeated over its tokens."""
    across, down = -(-q_len // 4), -(-kv_len // 4)
    whole = layout.repeat_interleave(across, 0).repeat_interleave(down, 1)
    return whole[:q_len, :kv_len]


def prefix_lengths(q_len: int, kv_len: int) -> Sequence[Tensor]:
    return (torch.tensor([3, 6]),)


def modality(q_len: int, kv_len: int) -> Sequence[Tensor]:
    ids = torch.full((BATCH, kv_len), -1)
    ids[0, 2:6] = 0
    ids[1, 4:8] = 1
    return (ids,)


def bidirectional_blocks(q_len: int, kv_len: int, ids: Tensor) -> Tensor:
    """Hugging Face's blockwise overlay: causal, or in the same image."""
    same = (ids[:, :q_len, None] == ids[:, None, :]) & (ids[:, :q_len, None] >= 0)
    return ((columns(kv_len) <= rows(q_len)) | same)[:, None]


def left_padded_chunks(q_len: int, kv_len: int, left: Tensor) -> Tensor:
    b = torch.arange(BATCH)[:, None, None, None]
    chunk_of_key = (columns(kv_len) - left[b]) // 4
    return (chunk_of_key == (rows(q_len) - left[b]) // 4) & (columns(kv_len) <= rows(q_len))


def lowest(dtype: torch.dtype = torch.float32) -> float:
    return torch.finfo(dtype).min


def hugging_face_4d(q_len: int, kv_len: int, kept: Tensor) -> Tensor:
    """The 4-D mask that older Hugging Face models build by hand."""
    low = lowest()
    mask = torch.full((q_len, kv_len), low)
    mask = mask * (torch.arange(kv_len) > torch.arange(q_len).reshape(-1, 1))
    mask = mask[None, None, :, :].expand(kept.shape[0], 1, -1, -1).clone()
    hidden = mask[:, :, :, :kv_len] + kept[:, None, None, :].to(mask.dtype)
    hidden = hidden == 0
    return torch.cat([mask[:, :, :, :kv_len].masked_fill(hidden, low), mask[:, :, :, kv_len:]], -1)


def converter_4d(q_len: int, kv_len: int, kept: Tensor) -> Tensor:
    """AttentionMaskConverter: a causal mask by masked_fill_, a padding mask by inversion."""
    low, places = lowest(), torch.arange(kv_len)
    causal = torch.full((q_len, kv_len), low)
    causal = causal.masked_fill(places < (torch.arange(q_len) + 1).view(q_len, 1), 0)
    inverted = 1.0 - kept[:, None, None, :].expand(-1, 1, q_len, -1).to(torch.float32)
    return causal[None, None].masked_fill(inverted.to(torch.bool), low)


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
        "key padding, key bias",
        padding,
    ),
    "times -1e4 of padding": Spelling(
        lambda q, k, kept: (1.0 - kept[:, None, None, :].float()) * -1e4, "full, key bias", padding
    ),
    "finfo.min where not causal": Spelling(
        lambda q, k: torch.where(columns(k) <= rows(q), 0.0, lowest()), "causal"
    ),
    "finfo.min where not causal nor kept": Spelling(
        lambda q, k, kept: torch.where(
            (columns(k) <= rows(q)) & kept[:, None, None, :], 0.0, lowest()
        ),
        "causal, key padding",
        padding,
    ),
    "two masks of finfo.min": Spelling(
        lambda q, k, kept: torch.where(columns(k) <= rows(q), 0.0, lowest())
        + torch.where(kept[:, None, None, :], 0.0, lowest()),
        "",
        padding,
    ),
    "-1e4 for documents": Spelling(
        lambda q, k, starts: torch.zeros(BATCH, 1, q, k).masked_fill(~same_document(starts), -1e4),
        "packed documents",
        documents,
        square=True,
    ),
    "Hugging Face, 4-D by hand": Spelling(
        hugging_face_4d, "causal, key padding", integer_padding, square=True
    ),
    "Hugging Face, by a converter": Spelling(converter_4d, "causal, key padding", padding),
    "Bloom's ALiBi": Spelling(bloom_alibi, "full, key bias", integer_padding),
    "MPT's ALiBi": Spelling(mpt_alibi, "causal, ALiBi bias", square=True),
    "T5's buckets, both sides": Spelling(
        t5_bias, "full, relative bias", lambda q, k: (distance_table(q, k)[0][:8],)
    ),
    "T5's buckets, one side": Spelling(
        lambda q, k, table: t5_bias(q, k, table, both=False), "full, relative bias",
        lambda q, k: (distance_table(q, k)[0][:8],),
    ),
    "DeBERTa's positions": Spelling(deberta_bias, "full, relative bias", query_table),
    "Swin's plane": Spelling(
        plane_bias, "full, relative bias", lambda q, k: (distance_table(q, k)[0][:49],)
    ),
    "a layout of blocks": Spelling(blocks, "", block_layout),
    "prefixes of given lengths": Spelling(
        lambda q, k, length: (
            (columns(k) <= rows(q)) | (columns(k) < length[:, None, None, None])
        ),
        "causal or prefixes of given lengths",
        prefix_lengths,
    ),
    "causal, images both ways": Spelling(
        bidirectional_blocks, "causal or packed documents and query padding", modality, square=True
    ),
    "chunks after left padding": Spelling(
        left_padded_chunks, "causal, chunks of 4", lambda q, k: (torch.tensor([2, 0]),)
    ),
    "global tokens": Spelling(
        lambda q, k: ((rows(q) - columns(k)).abs() <= 2) | (columns(k) < 1) | (rows(q) < 1), ""
    ),
    "dilated": Spelling(
        lambda q, k: ((rows(q) - columns(k)) % 3 == 0) & (columns(k) <= rows(q)), ""
    ),
    "a window for each head": Spelling(
        lambda q, k: (
            (rows(q) - columns(k))[None] <= torch.tensor([1, 3, 6])[:, None, None]
        ) & (columns(k) <= rows(q)),
        "causal, a window of given width",
    ),
    "half the heads causal": Spelling(
        lambda q, k: (torch.arange(HEADS)[:, None, None] < 1) | (columns(k) <= rows(q)), ""
    ),
    "in float positions": Spelling(
        lambda q, k: rows(q).float() - columns(k).float() > -0.5, ""
    ),
    "padding by lengths": Spelling(
        lambda q, k, length: columns(k) < length[:, None, None, None], "", prefix_lengths
    ),
    "an outer product of padding": Spelling(
        lambda q, k, kept: (kept[:, :, None] @ kept[:, None, :]).bool()[:, None], "",
        integer_padding, square=True,
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
