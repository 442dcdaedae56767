"""Models whose token axes are cut, joined, shifted, looked up or sorted between two attentions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["CONSTRUCTS", "HIDDEN", "VOCAB", "Around"]

Tensor = torch.Tensor
HIDDEN, HEADS, VOCAB = 16, 2, 32


class Around(nn.Module):
    """Embedding, attention, a construct under test, attention again, projection."""

    def __init__(self, construct: str, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.construct = construct
        self.causal = causal
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.prefix = nn.Parameter(torch.randn(1, 3, HIDDEN))
        self.router = nn.Linear(HIDDEN, 4)
        self.experts = nn.Parameter(torch.randn(4, HIDDEN, HIDDEN) / 4)
        self.kernel = nn.Parameter(torch.randn(HIDDEN, 1, 4) / 2)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        nn.init.normal_(self.qkv.weight, std=0.4)

    def attend(self, x: Tensor) -> Tensor:
        batch, seq_len, _ = x.shape
        q, k, v = self.qkv(x).view(batch, seq_len, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + mixed.transpose(1, 2).reshape(batch, seq_len, HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.out(CONSTRUCTS[self.construct](self, self.embed(ids), ids))
        return result


Construct = Callable[[Around, Tensor, Tensor], Tensor]


def class_token(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    first = m.prefix[:, :1].expand(x.shape[0], -1, -1)
    x = m.attend(m.attend(torch.cat([first, x], 1)))
    return x[:, 0] * m.weight + x[:, 1:].mean(1)


def registers(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    x = torch.cat([x * m.weight, m.prefix.expand(x.shape[0], -1, -1)], 1)
    return m.attend(x)[:, :-3]


def between(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Class token, tokens of one kind, registers, tokens of another kind."""
    batch, seq_len, _ = x.shape
    left, right = x[:, : seq_len // 2] * m.weight, x[:, seq_len // 2 :].tanh()
    extra = m.prefix.expand(batch, -1, -1)
    x = m.attend(torch.cat([extra[:, :1], left, extra[:, 1:], right], 1))
    return m.attend(x)[:, 1 : 1 + left.shape[1]]


def pooled_by_index(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    x = m.attend(x)
    return x[torch.arange(x.shape[0]), ids.argmax(-1)] * m.weight


def pooled_by_gather(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    last = (ids > 3).sum(1, keepdim=True) - 1
    x = m.attend(x)
    picked = x.gather(1, last.clamp_min(0)[..., None].expand(-1, -1, HIDDEN))
    return picked.squeeze(1) * m.weight + x.index_select(1, ids[0, :2] % 5).sum(1)


def pooled_in_a_flat_batch(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    x = m.attend(x)
    flat = x.reshape(-1, HIDDEN)
    return flat[torch.tensor([0, -1, 5, 7])] * m.weight


def last_tokens(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    return m.attend(x)[:, -4:-1].square() * m.weight


def by_expert(
    m: Around, rows: Tensor, weights: Tensor, ids: Tensor, put_back: Callable[..., Tensor]
) -> Tensor:
    """Rows sorted by expert, one grouped product, and back."""
    ids_sorted, order = torch.sort(ids)
    counts = torch.histc(ids_sorted.double(), bins=4, min=0, max=3)
    ends = counts.cumsum(0, dtype=torch.int32)
    y = grouped(rows[order // 2], m.experts, ends).relu() + m.prefix[0, :1] * ids_sorted[:, None]
    return put_back(y * weights[order, None], order)


def grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    from transformers.integrations import moe  # noqa: F401 - it registers the operator

    result: Tensor = torch.ops.transformers.grouped_mm_fallback(x, weights, offs=ends)
    return result


def routed(m: Around, x: Tensor, put_back: Callable[..., Tensor]) -> Tensor:
    x = m.attend(x)
    flat = x.reshape(-1, HIDDEN)
    weights, ids = torch.topk(m.router(flat).softmax(-1), 2, dim=-1)
    y = by_expert(m, flat, weights.reshape(-1), ids.reshape(-1), put_back)
    return m.attend(x + y.view_as(x))


def experts_inverse(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    def put_back(y: Tensor, order: Tensor) -> Tensor:
        return y[torch.argsort(order)].view(-1, 2, HIDDEN).sum(1)

    return routed(m, x, put_back)


def experts_scattered_inverse(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    def put_back(y: Tensor, order: Tensor) -> Tensor:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0])
        return y[inverse].view(-1, 2, HIDDEN).sum(1)

    return routed(m, x, put_back)


def experts_added(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    def put_back(y: Tensor, order: Tensor) -> Tensor:
        return torch.zeros(order.shape[0] // 2, HIDDEN, dtype=y.dtype).index_add(0, order // 2, y)

    return routed(m, x, put_back)


def experts_with_ranks(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """A row's place in the order of all enters its value: not each rank's own business."""

    def put_back(y: Tensor, order: Tensor) -> Tensor:
        place = torch.arange(order.shape[0], dtype=y.dtype)[:, None] / order.shape[0]
        return (y * place)[torch.argsort(order)].view(-1, 2, HIDDEN).sum(1)

    return routed(m, x, put_back)


def experts_chosen_in_turn(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Each choice is made apart, so that its numbers and weights are joined by themselves."""
    x = m.attend(x)
    flat = x.reshape(-1, HIDDEN)
    scores = m.router(flat).softmax(-1)
    first, one = scores.max(-1, keepdim=True)
    second, two = scores.masked_fill(scores == first, -1.0).max(-1, keepdim=True)
    weights, chosen = torch.cat((first, second), -1), torch.cat((one, two), -1)

    def put_back(y: Tensor, order: Tensor) -> Tensor:
        return y[torch.argsort(order)].view(-1, 2, HIDDEN).sum(1)

    y = by_expert(m, flat, weights.reshape(-1), chosen.reshape(-1), put_back)
    return m.attend(x + y.view_as(x))


def experts_side_by_side(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Every expert has all tokens, one copy of them after the other."""
    flat = m.attend(x).reshape(-1, HIDDEN)
    scores = m.router(flat).sigmoid().transpose(0, 1).reshape(-1, 1)
    copies = flat.repeat(4, 1) * scores
    y = torch.bmm(copies.view(4, -1, HIDDEN), m.experts).view(4, -1, HIDDEN).sum(0)
    return m.attend(y.view_as(x))


def tokens_repeated(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """A copy of each token for each of its two choices."""
    flat = m.attend(x).reshape(-1, HIDDEN)
    rows = flat.repeat_interleave(2, dim=0) * m.prefix[0, :2].repeat(flat.shape[0], 1)
    return m.attend(rows.view(-1, 2, HIDDEN).sum(1).view_as(x))


def dense_experts(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    x = m.attend(x)
    weights = m.router(x).softmax(-1)
    chosen = torch.zeros_like(weights).scatter(-1, weights.topk(2, -1).indices, 1.0)
    y = torch.einsum("bsh,ehd,bse->bsd", x, m.experts, weights * chosen)
    return m.attend(x + y)


def weights_by_token(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    x = m.attend(x)
    best, chosen = m.router(x).softmax(-1).max(-1)
    y = torch.matmul(x[..., None, :], m.experts[chosen]).squeeze(-2)
    return m.attend(x + y * best[..., None])


def causal_convolution(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    padded = F.pad(m.attend(x).transpose(1, 2), (3, 0))
    return m.attend(F.conv1d(padded, m.kernel, groups=HIDDEN).transpose(1, 2))


def cropped_convolution(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """As Mamba spells it: padded on both sides, then the first outputs kept."""
    x = m.attend(x).transpose(1, 2)
    y = F.conv1d(x, m.kernel, m.weight, padding=3, groups=HIDDEN)[..., : x.shape[-1]]
    return m.attend(F.silu(y).transpose(1, 2))


def wide_convolution(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    kernel = torch.cat([m.kernel, m.kernel[:, :, :1]], 2)
    x = m.attend(x).transpose(1, 2)
    y = F.conv1d(x, kernel[..., ::2], padding="same", groups=HIDDEN)
    y = F.conv1d(y, kernel[..., :3], padding=1, groups=HIDDEN)
    return m.attend((x + y).transpose(1, 2))


def stacked_convolutions(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    y = m.attend(x).transpose(1, 2)
    for _ in range(5):
        y = F.conv1d(y, m.kernel[:, :, :3], padding=1, groups=HIDDEN).tanh()
    return m.attend(y.transpose(1, 2))


def strided_stem(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """As Whisper's: frames, of which two make a token."""
    frames = torch.cat([x, x.tanh()], 1).view(x.shape[0], 2, -1, HIDDEN).permute(0, 3, 2, 1)
    frames = frames.reshape(x.shape[0], HIDDEN, -1)
    y = F.gelu(F.conv1d(frames, m.kernel[..., :3], padding=1, groups=HIDDEN))
    kernel = m.experts[:3].permute(1, 2, 0)
    return m.attend(F.conv1d(y, kernel, m.weight, stride=2, padding=1).transpose(1, 2))


def patches(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Columns of an image, two high and three wide, as tokens behind a class token."""
    batch, seq_len, _ = x.shape
    image = x.transpose(1, 2).reshape(batch, 4, 4, seq_len)
    image = torch.cat([image, image.cos()], 2).repeat_interleave(3, 3)
    kernel = (
        m.experts[0].reshape(HIDDEN, 4, 4)[:, :, :3, None].expand(-1, -1, -1, 2).transpose(2, 3)
    )
    y = F.conv2d(image[..., : seq_len * 3], kernel, m.weight, stride=(2, 3)).flatten(2)
    y = torch.cat([m.prefix[:, :1].expand(batch, -1, -1), y.transpose(1, 2)], 1)
    return m.attend(m.attend(y))


def token_shift(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """As RWKV's: each token mixed with the one before."""
    x = m.attend(x)
    before = F.pad(x, (0, 0, 1, -1))
    return m.attend(x * m.weight + before * (1 - m.weight))


def joined_shift(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    x = m.attend(x)
    before = torch.cat([torch.zeros_like(x[:, :2]), x[:, :-2]], 1)
    return m.attend(x * m.weight + before.tanh())


def rolled(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    x = m.attend(x)
    return m.attend(x * m.weight + x.roll(1, 1) - x.roll(-2, 1).square())


def neighbours(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    x = m.attend(x)
    difference = x[:, 1:] * m.weight - x[:, :-1]
    second = torch.diff(x.sin(), dim=1)
    return difference.square() + second


def prefix_untouched(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """As DINOv3 rotates: all but the first tokens, which are cut off and put back."""
    x = m.attend(torch.cat([m.prefix.expand(x.shape[0], -1, -1), x], 1))
    first, rest = x.split([3, x.shape[1] - 3], 1)
    return m.attend(torch.cat([first, rest * m.weight], 1))


def written_over(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    x = m.attend(x)
    y = x * m.weight
    y[:, 2:7] = x[:, 2:7].tanh()
    return m.attend(y)


def manual_convolution(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    x = m.attend(x)
    padded = F.pad(x, (0, 0, 2, 0))
    taps = [padded[:, i : i + x.shape[1]] * m.kernel[:, 0, i] for i in range(3)]
    return m.attend(taps[0] + taps[1] + taps[2])


def two_kinds(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Two kinds of tokens attend among themselves, then all together, then one to the other."""
    left, right = m.attend(x[:, :5] * m.weight), m.attend(x[:, 5:].sin())
    x = m.attend(m.attend(torch.cat([left, right], 1)))
    return torch.cat([m.attend(x[:, 2:9]), x[:, 9:]], 1)


def last_read_all(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """The last tokens look at all of them."""
    x = m.attend(x)
    batch, seq_len, _ = x.shape
    q, k, v = m.qkv(x).view(batch, seq_len, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q[:, :, 3:], k, v, is_causal=m.causal)
    return y.transpose(1, 2).reshape(batch, seq_len - 3, HIDDEN) + x[:, 3:]


def streams(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Three streams of the same tokens, of which the last two become a dimension (ProphetNet)."""
    batch, seq_len, _ = x.shape
    joined = m.attend(torch.cat([x, x * m.weight, x.tanh()], 1))
    rest = joined[:, seq_len:].view(batch, 2, seq_len, HIDDEN)
    for _ in range(4):  # enough of it that its place matters
        rest = m.qkv(rest).tanh() @ m.qkv.weight
    return joined[:, :seq_len] + rest[:, 0] - rest[:, 1].tanh()


def streams_apart(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Three streams in one dimension, of which some are taken by slices (ProphetNet)."""
    batch, seq_len, _ = x.shape
    x = m.attend(x)
    joined = torch.stack([x, x * m.weight, x.tanh()], 1).reshape(batch, -1, HIDDEN)
    joined = m.out(joined).sin() + joined
    rest = joined[:, seq_len:].view(batch, 2, seq_len, HIDDEN)
    first, *others = joined.chunk(3, 1)
    return m.attend(first + rest[:, 0] - rest[:, 1] * others[1].tanh())


def alternating(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Pairs of tokens, whose firsts and seconds are taken by strided slices."""
    x = m.attend(x)
    pairs = torch.stack([x * m.weight, x.tanh()], 2).reshape(x.shape[0], -1, HIDDEN)
    pairs = m.out(pairs).sin()
    return m.attend(pairs[:, ::2] - pairs[:, 1::2].square())


def unfolded(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Each token's neighbours weighed by numbers that it makes itself (ConvBERT)."""
    x = m.attend(x)
    batch, seq_len, _ = x.shape
    seen = F.unfold(x.transpose(1, 2).unsqueeze(-1), kernel_size=(3, 1), padding=(1, 0))
    seen = seen.transpose(1, 2).reshape(batch * seq_len, HIDDEN, 3)
    weights = m.router(x)[..., :3].softmax(-1).reshape(-1, 3, 1)
    return m.attend((seen @ weights).reshape(batch, seq_len, HIDDEN))


def image(m: Around, x: Tensor) -> Tensor:
    """Two rows of four columns for each token: [batch, 2 S, 4, hidden]."""
    rows = torch.stack([x * m.weight, x.square()], 2).reshape(x.shape[0], -1, HIDDEN)
    return torch.stack([rows, rows.sin(), rows.tanh(), rows.cos()], 2)


def by_window(m: Around, x: Tensor) -> Tensor:
    """Attention in each window of two by two, as plain products."""
    batch, height, width, _ = x.shape
    windows = x.view(batch, height // 2, 2, width // 2, 2, HIDDEN).permute(0, 1, 3, 2, 4, 5)
    q, k, v = m.qkv(windows.reshape(-1, 4, HIDDEN)).chunk(3, -1)
    y = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
    y = y.view(batch, height // 2, width // 2, 2, 2, HIDDEN).permute(0, 1, 3, 2, 4, 5)
    joined: Tensor = y.reshape(batch, height, width, HIDDEN)
    return joined


def windows(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Windows of an image, then windows shifted by one, then fewer tokens (Swin)."""
    y = image(m, m.attend(x))
    y = y + by_window(m, y)
    y = y + by_window(m, y.roll((-1, -1), (1, 2))).roll((1, 1), (1, 2)) * m.weight
    corners = [y[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    merged = torch.cat(corners, -1).reshape(x.shape[0], -1, 4 * HIDDEN)
    return m.attend(m.attend(merged.view(*merged.shape[:2], 4, HIDDEN).sum(2)))


def rows_of_an_image(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Tokens behind a class token that become rows and columns (DPT), and tokens again."""
    batch = x.shape[0]
    tokens = torch.cat([m.prefix[:, :1].expand(batch, -1, -1), image(m, x).flatten(1, 2)], 1)
    tokens = m.attend(tokens)
    grid = tokens[:, 1:].transpose(1, 2).reshape(batch, HIDDEN, -1, 4)
    kernel = m.experts[:3, :3].permute(2, 0, 1)[:, None]
    grid = F.conv2d(grid, kernel, padding=1, groups=HIDDEN).relu() + grid
    back = torch.cat([tokens[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    return m.attend(tokens + back * m.weight)


def frames(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Attention among places of each frame behind a class token (TimeSformer)."""
    batch, seq_len, _ = x.shape
    video = torch.stack([x, x.sin()], 2).reshape(batch, -1, HIDDEN)
    x = torch.cat([m.prefix[:, :1].expand(batch, -1, -1), video], 1)
    for _ in range(2):
        x = x + m.out(x).tanh()
        each = x[:, 1:].view(batch, seq_len, 2, HIDDEN).transpose(1, 2).reshape(-1, seq_len, HIDDEN)
        first = x[:, :1].expand(-1, 2, -1).reshape(-1, 1, HIDDEN)
        y = m.attend(torch.cat([first, each], 1))
        top = y[:, :1].view(batch, 2, HIDDEN).mean(1, keepdim=True)
        rest = y[:, 1:].view(batch, 2, seq_len, HIDDEN).transpose(1, 2).reshape(batch, -1, HIDDEN)
        x = x + torch.cat([top, rest], 1) * m.weight
    return x


def padded_blocks(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Blocks of four, the last one padded, that read the block before (LongT5)."""
    x = m.attend(x)
    batch, seq_len, _ = x.shape
    blocks = F.pad(x, (0, 0, 0, -seq_len % 4)).view(batch, -1, 4, HIDDEN)
    before = F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :-1]
    keys = torch.cat([before, blocks], 2)
    y = (m.out(blocks) @ keys.transpose(-1, -2) / 4).softmax(-1) @ keys.tanh()
    y = y.reshape(batch, -1, HIDDEN)[:, :seq_len]
    return m.attend(x + y * m.weight)


def padded_pairs(m: Around, x: Tensor, ids: Tensor) -> Tensor:
    """Two tokens made of each, and one more behind (SEW)."""
    x = m.attend(x)
    pairs = torch.stack([x * m.weight, x.tanh()], 2).reshape(x.shape[0], -1, HIDDEN)
    result: Tensor = m.out(F.pad(pairs, (0, 0, 0, 1))).tanh()
    return result


CONSTRUCTS: Mapping[str, Construct] = {
    "streams apart": streams_apart,
    "every other token": alternating,
    "unfolded": unfolded,
    "windows": windows,
    "rows of an image": rows_of_an_image,
    "frames": frames,
    "padded blocks": padded_blocks,
    "padded pairs": padded_pairs,
    "class token": class_token,
    "registers": registers,
    "pieces between pieces": between,
    "pooled by index": pooled_by_index,
    "pooled by gather": pooled_by_gather,
    "pooled in a flat batch": pooled_in_a_flat_batch,
    "last tokens": last_tokens,
    "two kinds of tokens": two_kinds,
    "last tokens read all": last_read_all,
    "causal convolution": causal_convolution,
    "cropped convolution": cropped_convolution,
    "wide convolution": wide_convolution,
    "stacked convolutions": stacked_convolutions,
    "strided stem": strided_stem,
    "patches": patches,
    "token shift": token_shift,
    "joined shift": joined_shift,
    "rolled": rolled,
    "neighbours": neighbours,
    "prefix untouched": prefix_untouched,
    "written over": written_over,
    "manual convolution": manual_convolution,
    "experts, inverse order": experts_inverse,
    "experts, inverse by scatter": experts_scattered_inverse,
    "experts, rows added": experts_added,
    "experts, order used": experts_with_ranks,
    "experts, chosen in turn": experts_chosen_in_turn,
    "experts, side by side": experts_side_by_side,
    "tokens repeated": tokens_repeated,
    "experts, dense": dense_experts,
    "experts, weights by token": weights_by_token,
    "streams": streams,
}


def inputs(seq_len: int, batch: int = 2) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seq_len)
    return (torch.randint(0, VOCAB, (batch, seq_len), generator=generator),)
