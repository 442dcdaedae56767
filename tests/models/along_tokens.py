"""Operators along the tokens, between two attentions or after both."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["ALONG", "Along"]

Tensor = torch.Tensor
HIDDEN, HEADS = 16, 2


class Along(nn.Module):
    """A projection, attention, an operator, and what it is used for, by name."""

    def __init__(self, name: str, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.causal = ALONG[name], causal
        self.inp, self.qkv = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)
        self.gates = nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.body(self, self.attend(self.inp(x)), x)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + mixed.transpose(1, 2).flatten(2)


Results = Tensor | tuple[Tensor, ...]
Body = Callable[[Along, Tensor, Tensor], Results]

# --- scans


def running_sum(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h.cumsum(1) / 10)


def running_mean(m: Along, h: Tensor, x: Tensor) -> Results:
    count = torch.ones_like(h[..., :1]).cumsum(1)
    return m.attend(h.cumsum(1) / count)


def positions_of_a_mask(m: Along, h: Tensor, x: Tensor) -> Results:
    position = (x[..., 0] > 0).cumsum(1) - 1
    return m.attend(h + position[..., None].to(h.dtype).sin())


def running_product(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h.sigmoid().cumprod(1))


def product_with_zeros(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(torch.where(x > 1.5, 0.0, h.sigmoid() + 0.5).cumprod(1))


def running_logsumexp(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h.logcumsumexp(1))


def running_maximum(m: Along, h: Tensor, x: Tensor) -> Results:
    values, places = h.cummax(1)
    return m.attend(values) + places.to(h.dtype).sin()


def running_minimum_of_ties(m: Along, h: Tensor, x: Tensor) -> Results:
    values, places = (h.mT * 2).round().cummin(-1)
    return m.attend(h + values.mT + places.mT.to(h.dtype).sin())


def scan_of_a_window(m: Along, h: Tensor, x: Tensor) -> Results:
    window = m.attend(h)[:, 2:-1]
    return window.cumsum(1), window.logcumsumexp(1), window.cummax(1)[0]


def linear_attention(m: Along, h: Tensor, x: Tensor) -> Results:
    """A state of keys times values, summed over the tokens so far."""
    q, k, v = (y[..., :4] for y in m.gates(h).chunk(3, -1))
    state = (k.sigmoid()[..., None] * v[..., None, :]).cumsum(1)
    return m.attend(h + (q[..., None] * state).sum(2).repeat(1, 1, 4) / 10)


def gated_recurrence(m: Along, h: Tensor, x: Tensor) -> Results:
    """h_t = a_t h_(t-1) + b_t with a in (0, 1), by logarithms of the gates."""
    a, b, _ = m.gates(h).chunk(3, -1)
    decay = F.logsigmoid(a / 4 + 2).cumsum(1)
    return m.attend(decay.exp() * (b * (-decay).exp()).cumsum(1))


def from_the_end(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h.flip(1).cumsum(1).flip(1) / 10)


# --- flips


def both_directions(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h) + m.attend(h.flip(1)).flip(1)


def flip_of_tokens_and_channels(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h.flip(1, 2)) * x.flip(1)


def flip_of_a_window(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h)[:, 1:].flip(1)


# --- softmax and reductions


def softmax_over_tokens(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h.softmax(1) * 5), h.masked_fill(x > 0.5, -torch.inf).softmax(1)


def log_softmax_over_tokens(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h.log_softmax(1))


def logsumexps(m: Along, h: Tensor, x: Tensor) -> Results:
    whole = h.logsumexp((1, 2))[:, None, None]
    return m.attend(h) + h.logsumexp(1, keepdim=True) + whole


def maximum_pooling(m: Along, h: Tensor, x: Tensor) -> Results:
    values, places = h.max(1)
    return values, places, h.amax(1), (h * 2).round().amin(1)


def maximum_taken_off(m: Along, h: Tensor, x: Tensor) -> Results:
    lowest, _ = (h * 2).round().min(1, keepdim=True)
    return m.attend(h - h.amax(1, keepdim=True) + lowest + h.max())


def truths(m: Along, h: Tensor, x: Tensor) -> Results:
    some = (x > 1.9).any(1, keepdim=True).to(h.dtype)
    return m.attend(h) * (1 + some) + (x > -2).all(1)[:, None].to(h.dtype)


def statistics(m: Along, h: Tensor, x: Tensor) -> Results:
    spread, mean = torch.std_mean(h, 1, keepdim=True)
    return m.attend((h - mean) / spread), h.var((1, 2)), F.normalize(h, dim=1)


def group_norm(m: Along, h: Tensor, x: Tensor) -> Results:
    weight, bias = m.inp.bias.cos(), m.inp.bias
    return m.attend(F.group_norm(h.mT, 4, weight, bias).mT)


# --- windows


def strided_convolution(m: Along, h: Tensor, x: Tensor) -> Results:
    kernel = m.gates.weight.unflatten(0, (3, HIDDEN)).permute(1, 2, 0)
    return m.attend(F.conv1d(h.mT, kernel, stride=2, padding=1).mT)


def convolution_without_padding(m: Along, h: Tensor, x: Tensor) -> Results:
    kernel = m.gates.weight.unflatten(0, (3, HIDDEN)).permute(1, 2, 0)
    return m.attend(F.conv1d(h.mT, kernel, m.inp.bias, stride=2).mT)


def mean_pools(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(F.avg_pool1d(h.mT, 2).mT), F.avg_pool1d(h.mT, 3, 1, 1)


def maximum_pool_of_pairs(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(F.max_pool1d((h.mT * 2).round() + h.mT / 100, 2).mT)


def pools_of_rows_and_columns(m: Along, h: Tensor, x: Tensor) -> Results:
    """Tokens as an image of four columns."""
    image = h[:, : h.shape[1] // 8 * 8].mT.unflatten(-1, (-1, 4))
    return F.avg_pool2d(image, 2), F.max_pool2d(image, 2)


def repeated_tokens(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(F.interpolate(h.mT, scale_factor=2).mT)


def windows_that_overlap(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h.unfold(1, 3, 1).mean(-1))


def windows_side_by_side(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h.unfold(1, 4, 4).amax(-1))


# --- what a mask picks


def vector_where_a_mask_says(m: Along, h: Tensor, x: Tensor) -> Results:
    h = h.clone()
    h[x[..., 0] > 0] = m.inp.bias
    h[:, x[0, :, 1] > 0] = m.inp.weight[:1]
    return m.attend(h)


def rows_where_a_mask_says(m: Along, h: Tensor, x: Tensor) -> Results:
    """Features of images at their places in a text."""
    images = (x[..., 0] > 0)[..., None]
    return m.attend(h.masked_scatter(images.expand_as(h), m.gates.weight.repeat(2, 1)))


def counts_of_kinds(m: Along, h: Tensor, x: Tensor) -> Results:
    kinds = (x[..., 0] * 2).long().clamp(0, 3)
    counts = F.one_hot(kinds, 4).sum(1).gather(1, kinds)
    return m.attend(h) * counts[..., None].to(h.dtype)


def differences_with_an_end(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h.diff(dim=1, prepend=h[:, :1]) + h.diff(dim=1, append=h[:, :1]))


# --- turned: whole rows of fewer channels


def transform(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h + torch.fft.fft2(h).real / 10)


def transform_and_back(m: Along, h: Tensor, x: Tensor) -> Results:
    f = torch.fft.rfft(h, n=2 * h.shape[1], dim=1) * m.inp.bias.cos()
    return m.attend(torch.fft.irfft(f, dim=1)[:, : h.shape[1]])


def autocorrelation(m: Along, h: Tensor, x: Tensor) -> Results:
    """What is sent is conjugated, lazily as torch does it."""
    turned = torch.complex(h, x).conj()
    found = torch.fft.fft(turned, dim=1)
    return m.attend(h + torch.fft.ifft(found * found.conj(), dim=1).conj().real.tanh())


def sums_of_segments(m: Along, h: Tensor, x: Tensor) -> Results:
    """Tokens of three kinds, added up by kind in two ways."""
    kinds = torch.arange(h.shape[1]) * 5 % 3
    sums = torch.zeros(len(h), 3, HIDDEN, dtype=h.dtype).index_add(1, kinds, m.inp(h))
    places = kinds[None, :, None].expand_as(h)
    others = h.new_zeros(len(h), 4, HIDDEN).scatter_add(1, places, m.inp(h).tanh())
    return m.attend(h + sums.mean(1, keepdim=True) + others[:, :1]), sums


def sorted_tokens(m: Along, h: Tensor, x: Tensor) -> Results:
    values, places = h.sort(1)
    return m.attend(values + h) + places.to(h.dtype).sin()


def median_taken_off(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h), h.mT.median(-1).values, h.topk(5, 1).values


def overlapping_maxima(m: Along, h: Tensor, x: Tensor) -> Results:
    return m.attend(h + F.max_pool1d(h.mT, 3, 1, 1).mT)


ALONG: Mapping[str, Body] = {
    f.__name__: f
    for f in (
        running_sum, running_mean, positions_of_a_mask, running_product, product_with_zeros,
        running_logsumexp, running_maximum, running_minimum_of_ties, scan_of_a_window,
        linear_attention, gated_recurrence, from_the_end, both_directions,
        flip_of_tokens_and_channels, flip_of_a_window, softmax_over_tokens,
        log_softmax_over_tokens, logsumexps, maximum_pooling, maximum_taken_off, truths,
        statistics, group_norm, strided_convolution, convolution_without_padding, mean_pools,
        maximum_pool_of_pairs, pools_of_rows_and_columns, repeated_tokens,
        windows_that_overlap, windows_side_by_side, vector_where_a_mask_says,
        rows_where_a_mask_says, counts_of_kinds, differences_with_an_end, transform,
        transform_and_back, autocorrelation, sums_of_segments, sorted_tokens, median_taken_off,
        overlapping_maxima,
    )
}  # fmt: skip
