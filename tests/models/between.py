"""One operator between two attentions: a tiny transformer for each row of a table.

A row is a function of the hidden states ``x`` [2, S, 16], the token ids [2, S] and the model, which
lends its parameters. What it returns is attended to again if it is hidden states itself, and is a
result of the model in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["HIDDEN", "OPERATORS", "Between", "inputs", "loss"]

Tensor = torch.Tensor
HIDDEN, HEADS, VOCAB = 16, 2, 32


class Between(nn.Module):
    """Embedding, attention, the operator under test, attention again, projection."""

    def __init__(self, name: str, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.name = name
        self.causal = causal
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.square = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / 4)
        self.kernel = nn.Parameter(torch.randn(HIDDEN, 1, 4) / 2)
        self.dense = nn.Parameter(torch.randn(HIDDEN, HIDDEN, 3) / 8)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        nn.init.normal_(self.qkv.weight, std=0.4)

    def attend(self, x: Tensor) -> Tensor:
        batch, seq_len, _ = x.shape
        q, k, v = self.qkv(x).view(batch, seq_len, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + mixed.transpose(1, 2).reshape(batch, seq_len, HIDDEN)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.attend(self.embed(ids))
        found = OPERATORS[self.name](self, x, ids)
        goes_on = found.is_floating_point() and found.dim() == 3 and found.shape[-1] == HIDDEN
        return self.out(self.attend(found if goes_on else x)), found


def inputs(seq_len: int) -> tuple[Tensor]:
    """No token twice in a sequence: equal ones tie, and rounding would choose between them."""
    draw = torch.Generator().manual_seed(seq_len)
    return (torch.stack([torch.randperm(VOCAB, generator=draw)[:seq_len] for _ in range(2)]),)


def loss(found: tuple[Tensor, Tensor]) -> Tensor:
    """Unlike in every element, of all results that have a gradient."""
    total = found[0].new_zeros(())
    for y in found:
        if y.is_floating_point():
            weights = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()
            total = total + (y * weights).square().sum() + y.mean()
    return total


Operator = Callable[[Between, Tensor, Tensor], Tensor]


# --- helpers ------------------------------------------------------------------------------------


def channels(change: Callable[[Tensor], Tensor]) -> Operator:
    """A change of [batch, channels, tokens]."""
    return lambda m, x, ids: change((x * m.weight).transpose(1, 2)).transpose(1, 2)


def target(x: Tensor) -> Tensor:
    """A smooth target without a gradient, unlike x."""
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape).sin()


def truths(x: Tensor) -> Tensor:
    return (target(x) > 0).to(x.dtype)


def classes(ids: Tensor) -> Tensor:
    """A class for each token, some of which are ignored."""
    return torch.where(ids % 5 == 0, -100, ids % HIDDEN)


def elementwise_loss(loss: Callable[..., Tensor], **options: object) -> Operator:
    return lambda m, x, ids: loss(x * m.weight, target(x), **options)


def entropy(**options: Any) -> Operator:
    def operator(m: Between, x: Tensor, ids: Tensor) -> Tensor:
        weight = m.weight.detach() if options.get("weight") else None
        rest = {k: v for k, v in options.items() if k != "weight"}
        rows = (x * m.weight).flatten(0, 1)
        return F.cross_entropy(rows, classes(ids).flatten(), weight=weight, **rest)

    return operator


def spread(m: Between, x: Tensor, y: Tensor) -> Tensor:
    """Hidden states that something computed over the tokens was added to."""
    return x * m.weight + y


# --- more than a line -----------------------------------------------------------------------------


def selective_scan(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    """A state-space model's slow path: a loop over tokens."""
    decay, state, states = (x * m.weight).sigmoid(), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + x[:, t]
        states.append(state)
    return torch.stack(states, 1)


def scan_by_cumsum(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    log_decay = F.logsigmoid(x * m.weight)
    total = log_decay.cumsum(1)
    return total.exp() * (x * (-total).exp()).cumsum(1)


def ctc(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    log_probs = (x * m.weight).log_softmax(-1).transpose(0, 1)
    lengths = torch.full((2,), x.shape[1])
    labels = ids[:, :3] % (HIDDEN - 1) + 1
    loss: Tensor = F.ctc_loss(log_probs, labels, lengths, torch.tensor([3, 2]))
    return loss


def linear_attention(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    sums: Tensor = (F.elu(k) + 1).transpose(1, 2) @ v
    return (F.elu(q) + 1) @ sums / x.shape[1]


def causal_linear_attention(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    states = torch.einsum("bti,btj->btij", k.sigmoid(), v).cumsum(1)
    return torch.einsum("bti,btij->btj", q, states)


def cumulative_mean(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
    return (x * m.weight).cumsum(1) / counts


def token_mixer(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    """Each token's hidden states mixed over the tokens by position (an MLP-Mixer)."""
    seq_len = x.shape[1]
    mixing = torch.linspace(-1, 1, seq_len * seq_len, dtype=x.dtype).view(seq_len, seq_len).cos()
    return x + (mixing @ (x * m.weight)) / seq_len


def padded_positions(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    kept = ids % 3 != 0
    positions = kept.cumsum(1) - 1
    return x * positions.masked_fill(~kept, 1)[..., None].to(x.dtype).cos() * m.weight


def scattered(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    order = torch.argsort(ids, dim=1, stable=True)[..., None].expand_as(x)
    return torch.zeros_like(x).scatter(1, order, x * m.weight)


def scatter_added(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    where = (ids % 4)[..., None].expand_as(x)
    return torch.zeros(2, 4, HIDDEN, dtype=x.dtype).scatter_add(1, where, x * m.weight)


def index_added(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    rows = (x * m.weight).flatten(0, 1)
    return torch.zeros(VOCAB, HIDDEN, dtype=x.dtype).index_add(0, ids.flatten(), rows)


def index_put(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    y = x * m.weight
    y[:, [0, 2]] = y[:, [1, 3]] * 2
    return y


def masked_replaced(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    y = x * 1
    y[ids == 3] = m.weight
    return y


def image(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    """The tokens as an image of one row."""
    return (x * m.weight).transpose(1, 2).unsqueeze(2)


def segment_means(m: Between, x: Tensor, ids: Tensor) -> Tensor:
    rows = (x * m.weight).flatten(0, 1)
    lengths = torch.tensor([3, 2, rows.shape[0] - 5])
    return torch.segment_reduce(rows, "mean", lengths=lengths)


OPERATORS: Mapping[str, Operator] = {
    # Scans along the tokens.
    "cumsum": lambda m, x, ids: (x * m.weight).cumsum(1),
    "cumsum of integers": lambda m, x, ids: x * ids.cumsum(1)[..., None].to(x.dtype).cos(),
    "cumsum backwards": lambda m, x, ids: (x * m.weight).flip(1).cumsum(1).flip(1),
    "cumprod": lambda m, x, ids: ((x * m.weight).tanh() / 4 + 1).cumprod(1),
    "logcumsumexp": lambda m, x, ids: (x * m.weight).logcumsumexp(1),
    "cummax": lambda m, x, ids: (x * m.weight).cummax(1).values,
    "cumulative mean": cumulative_mean,
    "positions of kept tokens": padded_positions,
    "selective scan": selective_scan,
    "scan by cumsum": scan_by_cumsum,
    "causal linear attention": causal_linear_attention,
    "linear attention": linear_attention,
    "token mixer": token_mixer,
    "diff": lambda m, x, ids: (x * m.weight).diff(dim=1),
    "diff with prefix": lambda m, x, ids: (x * m.weight).diff(dim=1, prepend=x[:, :1]),
    # Statistics over the tokens.
    "softmax": lambda m, x, ids: (x * m.weight).softmax(1) * x,
    "log_softmax": lambda m, x, ids: (x * m.weight).log_softmax(1) + x,
    "softmin": lambda m, x, ids: F.softmin(x * m.weight, 1) * x,
    "logsumexp": lambda m, x, ids: spread(m, x, (x * m.weight).logsumexp(1, keepdim=True)),
    "attention pooling": lambda m, x, ids: ((x @ m.weight).softmax(1))[:, None] @ x,
    "mean": lambda m, x, ids: spread(m, x, x.mean(1, keepdim=True)),
    "amax": lambda m, x, ids: spread(m, x, (x * m.weight).amax(1, keepdim=True)),
    "amin": lambda m, x, ids: spread(m, x, (x * m.weight).amin((1, 2), keepdim=True)),
    "max of all": lambda m, x, ids: x / (x * m.weight).max(),
    "max": lambda m, x, ids: spread(m, x, (x * m.weight).max(1, keepdim=True).values),
    "max, its place": lambda m, x, ids: (x * m.weight).max(1).indices,
    "min": lambda m, x, ids: spread(m, x, (x * m.weight).min(1, keepdim=True)[0]),
    "argmax": lambda m, x, ids: x.argmax(1),
    "argmin of all": lambda m, x, ids: x.argmin(),
    "any": lambda m, x, ids: x * (x > 1).any(1, keepdim=True) + m.weight,
    "all": lambda m, x, ids: x * (x > -2).all(1, keepdim=True) + m.weight,
    "any of all": lambda m, x, ids: x * (ids == 3).any() + m.weight,
    "var": lambda m, x, ids: spread(m, x, (x * m.weight).var(1, keepdim=True)),
    "std": lambda m, x, ids: x / (x * m.weight).std((1, 2), keepdim=True, correction=0),
    "var_mean": lambda m, x, ids: spread(
        m, x, torch.stack(torch.var_mean(x, 1, keepdim=True)).sum(0)
    ),
    "norm": lambda m, x, ids: x / (x * m.weight).norm(dim=1, keepdim=True),
    "norm of all": lambda m, x, ids: x / (x * m.weight).norm(),
    "infinity norm": lambda m, x, ids: x / torch.linalg.vector_norm(x, float("inf"), (1,), True),
    "normalize": lambda m, x, ids: F.normalize(x * m.weight, dim=1),
    "prod": lambda m, x, ids: (x.sigmoid() + 0.5).prod(1) * m.weight,
    "median": lambda m, x, ids: spread(m, x, (x * m.weight).median(1, keepdim=True).values),
    "quantile": lambda m, x, ids: spread(m, x, x.quantile(0.5, 1, keepdim=True)),
    "topk": lambda m, x, ids: (x * m.weight).topk(3, 1).values,
    "topk tokens": lambda m, x, ids: (
        x * m.weight * (x.sum(-1) >= x.sum(-1).topk(3, 1).values[:, -1:])[..., None]
    ),
    "sort": lambda m, x, ids: (x * m.weight).sort(1).values,
    "a size that is a tensor": lambda m, x, ids: (x * m.weight).view(
        x.size(0),
        cast(int, torch.div(x.size(1), 1, rounding_mode="trunc")),
        HIDDEN,
    ),
    "argsort": lambda m, x, ids: (x * m.weight).argsort(1),
    "instance norm": channels(lambda x: F.instance_norm(x)),
    "group norm": channels(lambda x: F.group_norm(x, 4)),
    "batch norm": channels(lambda x: F.batch_norm(x, None, None, training=True)),
    "layer norm over tokens": lambda m, x, ids: F.layer_norm(x * m.weight, x.shape[1:]),
    "count": lambda m, x, ids: x * m.weight / (ids > 5).sum(1)[:, None, None],
    "histogram": lambda m, x, ids: torch.bincount(ids.flatten(), minlength=VOCAB),
    "histc": lambda m, x, ids: torch.histc(x.detach(), 5, -1, 1),
    "covariance": lambda m, x, ids: x @ ((x * m.weight).transpose(1, 2) @ x) / x.shape[1],
    "cosine similarity": lambda m, x, ids: F.cosine_similarity(x * m.weight, target(x), 1),
    "gram of tokens": lambda m, x, ids: ((x * m.weight) @ x.transpose(1, 2)).tanh() @ x,
    "cdist": lambda m, x, ids: torch.cdist(x * m.weight, x),
    # Moves.
    "flip": lambda m, x, ids: (x * m.weight).flip(1),
    "flip of both": lambda m, x, ids: (x * m.weight).flip((1, 2)),
    "roll": lambda m, x, ids: (x * m.weight).roll(2, 1),
    "roll of both": lambda m, x, ids: (x * m.weight).roll((1, 2), (1, 2)),
    "roll of all": lambda m, x, ids: (x * m.weight).roll(3),
    "rot90": lambda m, x, ids: (x * m.weight).rot90(2, (1, 2)),
    "pad": lambda m, x, ids: F.pad(x * m.weight, (0, 0, 1, 2)),
    "pad with ones": lambda m, x, ids: F.pad(x * m.weight, (0, 0, 2, 0), value=1.0),
    "pad, reflect": channels(lambda x: F.pad(x, (2, 1), mode="reflect")),
    "pad, replicate": channels(lambda x: F.pad(x, (2, 1), mode="replicate")),
    "pad, circular": channels(lambda x: F.pad(x, (2, 1), mode="circular")),
    "every second": lambda m, x, ids: (x * m.weight)[:, ::2],
    "every second, doubled": lambda m, x, ids: (x * m.weight)[:, ::2].repeat_interleave(2, 1),
    "repeated": lambda m, x, ids: (x * m.weight).repeat(1, 2, 1),
    "repeat_interleave": lambda m, x, ids: (x * m.weight).repeat_interleave(2, 1),
    "tile": lambda m, x, ids: torch.tile(x * m.weight, (2, 1)),
    "unfold": lambda m, x, ids: (x * m.weight).unfold(1, 3, 1).sum(-1),
    "unfold, strided": lambda m, x, ids: (x * m.weight).unfold(1, 4, 2).flatten(2),
    "im2col": lambda m, x, ids: F.unfold(image(m, x, ids), (1, 3), padding=(0, 1)).transpose(1, 2),
    "fold": lambda m, x, ids: F.fold(
        F.unfold(image(m, x, ids), (1, 3), padding=(0, 1)), (1, x.shape[1]), (1, 3), padding=(0, 1)
    ),
    "stack": lambda m, x, ids: torch.stack([x, x * m.weight], 2).flatten(1, 2),
    "swapped halves": lambda m, x, ids: torch.cat(x.mul(m.weight).tensor_split(2, 1)[::-1], 1),
    "diagonal": lambda m, x, ids: (x * m.weight).diagonal(0, 1, 2),
    "tril": lambda m, x, ids: (x * m.weight).tril(),
    "triu of pairs": lambda m, x, ids: ((x @ x.transpose(1, 2)) * 0.1).triu(1) @ (x * m.weight),
    "outer difference": lambda m, x, ids: (x[:, :, None] - x[:, None]).square().mean(2),
    "unbind": lambda m, x, ids: torch.stack((x * m.weight).unbind(1)[::-1], 1),
    "transposed": lambda m, x, ids: (x * m.weight).mT.softmax(-1).mT,
    # Lookups and writes by number.
    "gather": lambda m, x, ids: (x * m.weight).gather(
        1, torch.argsort(ids, dim=1, stable=True)[..., None].expand_as(x)
    ),
    "take_along_dim": lambda m, x, ids: (x * m.weight).take_along_dim(
        torch.argsort(ids, dim=1, stable=True)[..., None], 1
    ),
    "index_select": lambda m, x, ids: (x * m.weight).index_select(1, torch.tensor([3, 1, 1])),
    "permuted": lambda m, x, ids: (x * m.weight)[:, torch.argsort(ids[0], stable=True)],
    "scatter": scattered,
    "scatter_add": scatter_added,
    "index_add": index_added,
    "index_put": index_put,
    "index_fill": lambda m, x, ids: (x * m.weight).index_fill(1, torch.tensor([0, 4]), 2.0),
    "index_copy": lambda m, x, ids: (x * m.weight).index_copy(1, torch.tensor([0, 4]), x[:, 2:4]),
    "masked write": masked_replaced,
    "masked_scatter": lambda m, x, ids: x.masked_scatter((ids % 2 == 0)[..., None], x * m.weight),
    "put": lambda m, x, ids: x.put(torch.tensor([3, 40]), torch.ones(2, dtype=x.dtype)) * m.weight,
    "take": lambda m, x, ids: (x * m.weight).take(torch.tensor([3, 40, 100])),
    "bucketize": lambda m, x, ids: (
        x * m.weight * torch.bucketize(x.detach(), torch.linspace(-1, 1, 5, dtype=x.dtype))
    ),
    "searchsorted": lambda m, x, ids: torch.searchsorted(
        x[..., 0].detach().sort(1).values, x[:, :3, 1].detach().contiguous()
    ),
    "one_hot": lambda m, x, ids: x + F.one_hot(ids % HIDDEN, HIDDEN).to(x.dtype) @ m.square,
    "embedding_bag": lambda m, x, ids: F.embedding_bag(ids % HIDDEN, m.square, mode="mean"),
    "segment_reduce": segment_means,
    "isin": lambda m, x, ids: x * m.weight * torch.isin(ids, torch.tensor([1, 5, 9]))[..., None],
    # Convolutions and pools.
    "depthwise causal conv1d": lambda m, x, ids: F.conv1d(
        x.transpose(1, 2), m.kernel, padding=3, groups=HIDDEN
    )[..., : x.shape[1]].transpose(1, 2),
    "conv1d": lambda m, x, ids: F.conv1d(x.transpose(1, 2), m.dense, padding=1).transpose(1, 2),
    "conv1d, stride 2": lambda m, x, ids: F.conv1d(
        x.transpose(1, 2), m.dense, stride=2, padding=1
    ).transpose(1, 2),
    "conv1d, dilated": lambda m, x, ids: F.conv1d(
        x.transpose(1, 2), m.dense, padding=2, dilation=2
    ).transpose(1, 2),
    "conv_transpose1d": lambda m, x, ids: F.conv_transpose1d(
        x.transpose(1, 2), m.dense, stride=2
    ).transpose(1, 2),
    "avg_pool1d": channels(lambda x: F.avg_pool1d(x, 3, 1, 1)),
    "avg_pool1d, stride 2": channels(lambda x: F.avg_pool1d(x, 2)),
    "max_pool1d": channels(lambda x: F.max_pool1d(x, 3, 1, 1)),
    "max_pool1d, stride 2": channels(lambda x: F.max_pool1d(x, 2)),
    "adaptive_avg_pool1d": channels(lambda x: F.adaptive_avg_pool1d(x, 4)),
    "adaptive_max_pool1d": channels(lambda x: F.adaptive_max_pool1d(x, 4)),
    "lp_pool1d": channels(lambda x: F.lp_pool1d(x.abs() + 0.1, 2, 2)),
    "interpolate, nearest": channels(lambda x: F.interpolate(x, scale_factor=2.0)),
    "interpolate, linear": channels(lambda x: F.interpolate(x, size=9, mode="linear")),
    "interpolate, bilinear": lambda m, x, ids: F.interpolate(
        image(m, x, ids), scale_factor=(1, 2), mode="bilinear", align_corners=False
    ),
    "interpolate, bicubic": lambda m, x, ids: F.interpolate(
        image(m, x, ids), size=(2, 7), mode="bicubic", align_corners=True
    ),
    "pixel_shuffle": lambda m, x, ids: F.pixel_shuffle(image(m, x, ids), 2),
    "grid_sample": lambda m, x, ids: F.grid_sample(
        image(m, x, ids),
        torch.linspace(-1, 1, 24, dtype=x.dtype).view(2, 2, 3, 2),
        align_corners=False,
    ),
    "glu": lambda m, x, ids: F.glu(F.linear(x, torch.cat([m.square, m.square.sin()]))),
    "bilinear": lambda m, x, ids: F.bilinear(x, x.tanh(), m.square[:, :, None] * m.weight),
    # Transforms.
    "fft": lambda m, x, ids: torch.fft.fft(torch.fft.fft(x * m.weight, dim=-1), dim=1).real,
    "rfft": lambda m, x, ids: torch.fft.irfft(
        torch.fft.rfft(x * m.weight, dim=1), n=x.shape[1], dim=1
    ),
    "fft2": lambda m, x, ids: torch.fft.fft2(x * m.weight).real,
    "long convolution": lambda m, x, ids: (
        torch.fft.irfft(
            torch.fft.rfft(x, n=2 * x.shape[1], dim=1)
            * torch.fft.rfft(target(x[0]), n=2 * x.shape[1], dim=0),
            n=2 * x.shape[1],
            dim=1,
        )[:, : x.shape[1]]
        * m.weight
    ),
    "stft": lambda m, x, ids: torch.stft(
        (x * m.weight).sum(-1), 4, window=torch.ones(4, dtype=x.dtype), return_complex=True
    ).abs(),
    "complex rotation": lambda m, x, ids: torch.view_as_real(
        torch.view_as_complex((x * m.weight).unflatten(-1, (-1, 2)))
        * torch.polar(torch.ones_like(x[0, :, :1]), target(x[0, :, :1]))
    ).flatten(2),
    "angle": lambda m, x, ids: torch.angle(torch.complex(x * m.weight, x.cos())),
    # Losses.
    "cross entropy": entropy(),
    "cross entropy, weighted": entropy(weight=True),
    "cross entropy, smoothed": entropy(label_smoothing=0.1),
    "cross entropy, smoothed, weighted": entropy(label_smoothing=0.1, weight=True),
    "cross entropy, sum": entropy(reduction="sum"),
    "cross entropy, none": entropy(reduction="none", label_smoothing=0.1, weight=True),
    "cross entropy, ignore": lambda m, x, ids: F.cross_entropy(
        (x * m.weight).flatten(0, 1), ids.flatten() % HIDDEN, ignore_index=3
    ),
    "cross entropy of classes in front": lambda m, x, ids: F.cross_entropy(
        (x * m.weight).transpose(1, 2), classes(ids)
    ),
    "cross entropy of probabilities": lambda m, x, ids: F.cross_entropy(
        (x * m.weight).flatten(0, 1), target(x).softmax(-1).flatten(0, 1)
    ),
    "cross entropy along tokens": lambda m, x, ids: F.cross_entropy(
        x * m.weight,
        (ids[:, :HIDDEN] if ids.shape[1] >= HIDDEN else F.pad(ids, (0, HIDDEN - ids.shape[1])))
        % x.shape[1],
    ),
    "nll_loss": lambda m, x, ids: F.nll_loss(
        (x * m.weight).log_softmax(-1).flatten(0, 1), classes(ids).flatten()
    ),
    "nll_loss, weighted": lambda m, x, ids: F.nll_loss(
        (x * m.weight).log_softmax(-1).transpose(1, 2), classes(ids), m.weight.detach()
    ),
    "nll_loss, sum": lambda m, x, ids: F.nll_loss(
        (x * m.weight).log_softmax(-1).flatten(0, 1), ids.flatten() % HIDDEN, reduction="sum"
    ),
    "nll_loss, none": lambda m, x, ids: F.nll_loss(
        (x * m.weight).log_softmax(-1).transpose(1, 2), classes(ids), reduction="none"
    ),
    "mse_loss": elementwise_loss(F.mse_loss),
    "mse_loss, none": elementwise_loss(F.mse_loss, reduction="none"),
    "mse_loss, weighted": lambda m, x, ids: F.mse_loss(
        x * m.weight,
        target(x),
        weight=truths(x) + 1,  # type: ignore[call-arg]
    ),
    "l1_loss": elementwise_loss(F.l1_loss),
    "l1_loss, sum": elementwise_loss(F.l1_loss, reduction="sum"),
    "smooth_l1_loss": elementwise_loss(F.smooth_l1_loss, beta=0.3),
    "huber_loss": elementwise_loss(F.huber_loss, delta=0.3),
    "huber_loss, sum": elementwise_loss(F.huber_loss, delta=0.3, reduction="sum"),
    "kl_div": elementwise_loss(F.kl_div, log_target=True),
    "kl_div, batchmean": elementwise_loss(F.kl_div, log_target=True, reduction="batchmean"),
    "kl_div of probabilities": lambda m, x, ids: F.kl_div(
        (x * m.weight).log_softmax(-1), target(x).softmax(-1), reduction="sum"
    ),
    "bce": lambda m, x, ids: F.binary_cross_entropy((x * m.weight).sigmoid(), truths(x)),
    "bce, sum": lambda m, x, ids: F.binary_cross_entropy(
        (x * m.weight).sigmoid(), truths(x), reduction="sum"
    ),
    "bce with logits": lambda m, x, ids: F.binary_cross_entropy_with_logits(
        x * m.weight, truths(x)
    ),
    "bce with logits, weighted": lambda m, x, ids: F.binary_cross_entropy_with_logits(
        x * m.weight, truths(x), weight=truths(x) + 1, pos_weight=m.weight.detach()
    ),
    "bce with logits, sum": lambda m, x, ids: F.binary_cross_entropy_with_logits(
        x * m.weight, truths(x), reduction="sum", pos_weight=m.weight.detach()
    ),
    "soft margin": lambda m, x, ids: F.soft_margin_loss(x * m.weight, truths(x) * 2 - 1),
    "hinge embedding": lambda m, x, ids: F.hinge_embedding_loss(x * m.weight, truths(x) * 2 - 1),
    "poisson nll": lambda m, x, ids: F.poisson_nll_loss(x * m.weight, truths(x)),
    "gaussian nll": lambda m, x, ids: F.gaussian_nll_loss(
        x * m.weight, target(x), x.square().detach() + 0.1
    ),
    "cosine embedding": lambda m, x, ids: F.cosine_embedding_loss(
        (x * m.weight).flatten(0, 1), target(x).flatten(0, 1), ids.flatten() % 2 * 2 - 1
    ),
    "margin ranking": lambda m, x, ids: F.margin_ranking_loss(
        x * m.weight, target(x), truths(x) * 2 - 1, margin=0.2
    ),
    "triplet margin": lambda m, x, ids: F.triplet_margin_loss(
        (x * m.weight).flatten(0, 1), target(x).flatten(0, 1), x.tanh().flatten(0, 1)
    ),
    "multi margin": lambda m, x, ids: F.multi_margin_loss(
        (x * m.weight).flatten(0, 1), ids.flatten() % HIDDEN
    ),
    "multilabel soft margin": lambda m, x, ids: F.multilabel_soft_margin_loss(
        (x * m.weight).flatten(0, 1), truths(x).flatten(0, 1)
    ),
    "ctc": ctc,
    "contrastive": lambda m, x, ids: F.cross_entropy(
        F.normalize((x * m.weight).mean(1), dim=-1) @ F.normalize(x[:, 0], dim=-1).T,
        torch.arange(2),
    ),
    "perplexity": lambda m, x, ids: (
        (x * m.weight)
        .log_softmax(-1)
        .gather(-1, (ids % HIDDEN)[..., None])
        .squeeze(-1)
        .mean()
        .exp()
    ),
    "masked mean": lambda m, x, ids: (
        (x * (ids > 4)[..., None] * m.weight).sum(1) / (ids > 4).sum(1, keepdim=True)
    ),
    # Sizes that depend on values.
    "masked_select": lambda m, x, ids: (x * m.weight)[ids % 2 == 0],
    "nonzero": lambda m, x, ids: (ids % 2 == 0).nonzero(),
    "unique": lambda m, x, ids: ids.unique(),
}
