"""A few operators together, as models write them: draws into new memory, and 0 / 0 in rows of 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

__all__ = ["COMPOSED", "DRAWS"]

Tensor = torch.Tensor
Function = Callable[[Tensor], Tensor]


def _drawn(fill: Callable[[Tensor], Tensor]) -> Function:
    return lambda h: h * fill(torch.empty_like(h))


def _differences(h: Tensor) -> Tensor:
    """Between neighbours, the last of which has none."""
    return F.pad(h[:, 1:] - h[:, :-1], (0, 0, 0, 1))


DRAWS: Mapping[str, Function] = {
    "uniform_()": _drawn(lambda x: x.uniform_()),
    "uniform_(-1, 1)": _drawn(lambda x: x.uniform_(-1, 1)),
    "normal_()": _drawn(lambda x: x.normal_()),
    "normal_(1, 2)": _drawn(lambda x: x.normal_(mean=1, std=2)),
    "exponential_()": _drawn(lambda x: x.exponential_()),
    "exponential_(2)": _drawn(lambda x: x.exponential_(lambd=2.0)),
    "cauchy_()": _drawn(lambda x: x.cauchy_(median=1, sigma=0.5)),
    "geometric_(p)": _drawn(lambda x: x.geometric_(0.3)),
    "log_normal_()": _drawn(lambda x: x.log_normal_(0, 0.5)),
    "bernoulli_()": _drawn(lambda x: x.bernoulli_()),
    "bernoulli_(p)": _drawn(lambda x: x.bernoulli_(0.3)),
    "bernoulli_(tensor)": lambda h: h * torch.empty_like(h).bernoulli_(h.detach().sigmoid()),
    "random_()": _drawn(lambda x: x.random_()),
    "random_(to)": _drawn(lambda x: x.random_(9)),
    "random_(from, to)": _drawn(lambda x: x.random_(-2, 9)),
    "random_(from=, to=)": _drawn(lambda x: x.random_(**{"from": 3, "to": 7})),
    "new_empty": lambda h: h + h.new_empty(h.shape).uniform_(),
    "empty": lambda h: h + torch.empty(h.shape, dtype=h.dtype).normal_(),
    "whole numbers": lambda h: h * torch.empty(h.shape, dtype=torch.long).random_(5),
    "whole numbers from": lambda h: h * torch.empty(h.shape, dtype=torch.long).random_(2, 5),
    "a part": lambda h: h + torch.zeros_like(h).index_fill(1, torch.arange(2), 1.0).uniform_(1, 2),
    "transposed": lambda h: h * torch.empty_like(h).mT.random_(1, 5).mT,
    "rand_like": lambda h: h * torch.rand_like(h) * torch.randn_like(h),
    "randint_like": lambda h: h * torch.randint_like(h, 9) * torch.randint_like(h, 1, 9),
    "bernoulli": lambda h: h * torch.bernoulli(h.detach().sigmoid()),
    "normal": lambda h: torch.normal(h.detach(), 1.0) + h,
    "dropout": lambda h: F.dropout(h, 0.4),
    "dropout1d": lambda h: F.dropout1d(h, 0.4),
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.4, training=True),
    "feature_alpha_dropout": lambda h: F.feature_alpha_dropout(h, 0.4, training=True),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "gumbel_softmax": lambda h: F.gumbel_softmax(h),
    "gumbel_softmax, hard": lambda h: F.gumbel_softmax(h, hard=True),
}

COMPOSED: Mapping[str, Function] = {
    "norm over width": lambda h: h / h.norm(dim=-1, keepdim=True),
    "norm over tokens": lambda h: h / h.norm(dim=1, keepdim=True),
    "norm of differences": lambda h: _differences(h).norm(dim=-1),
    "norm by hand": lambda h: (h * h).sum(-1).sqrt(),
    "norm of differences by hand": lambda h: _differences(h).square().sum(-1).sqrt(),
    "sqrt of a sum over tokens": lambda h: h.square().sum(1).sqrt(),
    "log of a sum": lambda h: h.abs().sum(-1).log(),
    "log of differences": lambda h: _differences(h).abs().log(),
    "logarithms where positive": lambda h: torch.where(h > 0, h, 1.0).log().sum(1),
    "normalize": lambda h: F.normalize(h, dim=-1) + F.normalize(h, dim=1),
    "cosines": lambda h: F.cosine_similarity(h[:, :, None], h[:, None], dim=-1),
    "cosines of neighbours": lambda h: F.cosine_similarity(h[:, 1:], h[:, :-1], dim=-1),
    "weighted mean": lambda h: (h * h.relu()).sum(1) / h.relu().sum(1),
    "masked mean": lambda h: (h * (h > 1)).sum(1) / (h > 1).sum(1).clamp(min=1),
    "masked mean of none": lambda h: (h * (h > 1e3)).sum(1) / (h > 1e3).sum(1),
    "atan2": lambda h: torch.atan2(h, h.roll(1, 1)),
    "atan2 of differences": lambda h: torch.atan2(_differences(h), _differences(h).roll(1, -1)),
    "ratio of differences": lambda h: _differences(h) / _differences(h).roll(1, -1),
    "std over width": lambda h: (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True),
    "std over tokens": lambda h: (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True),
    "var of differences": lambda h: _differences(h).var(-1).sqrt(),
    "logsumexp of hidden rows": lambda h: h.masked_fill(h < 0.9, -torch.inf).logsumexp(-1),
    "logsumexp over hidden tokens": lambda h: h.masked_fill(h < 0.9, -torch.inf).logsumexp(1),
    "softmax of hidden rows": lambda h: h.masked_fill(h < 0.9, -torch.inf).softmax(-1),
    "softmax over hidden tokens": lambda h: h.masked_fill(h < 0.9, -torch.inf).softmax(1),
    "softmax by hand": lambda h: h.exp() / h.exp().sum(1, keepdim=True),
    "distances": lambda h: torch.cdist(h, h),
    "distances by hand": lambda h: (h[:, :, None] - h[:, None]).norm(dim=-1),
    "powers": lambda h: h.abs() ** 0.5 + h.abs().pow(-0.5).clamp(max=9),
    "power of a shifted": lambda h: F.pad(h, (0, 0, 1, 0))[:, :-1].abs() ** 0.5,
    "reciprocal of shifted": lambda h: 1 / F.pad(h, (0, 0, 2, 0))[:, :-2],
    "log of shifted": lambda h: F.pad(h, (0, 0, 1, 0), value=1.0)[:, :-1].abs().log(),
    "log of convolved": lambda h: (
        F.conv1d(h.mT, torch.ones_like(h[0, 0]).expand(1, -1)[..., None].repeat(1, 1, 3), padding=1)
        .abs()
        .log()
    ),
    "norm of rolled differences": lambda h: (h - h.roll(1, 1)).norm(dim=-1),
    "rsqrt of joined": lambda h: torch.cat([h[:, :1], h], 1).square().mean(-1).rsqrt(),
    "log of a cumulative sum": lambda h: h.abs().cumsum(1).log(),
    "log of looked up": lambda h: h[:, (torch.arange(h.shape[1]) * 3) % h.shape[1]].abs().log(),
    "sort": lambda h: h.sort(1).values.diff(dim=1).sqrt(),
    "entropy": lambda h: -(h.softmax(-1) * h.softmax(-1).log()).sum(-1),
    "xlogy": lambda h: torch.xlogy(h.abs(), h.abs()).sum(1),
    "rms": lambda h: h * h.square().mean(-1, keepdim=True).rsqrt(),
    "layer norm without eps": lambda h: F.layer_norm(h, h.shape[-1:], eps=0.0),
    "batch norm": lambda h: F.batch_norm(h.mT, None, None, training=True),
    "instance norm": lambda h: F.instance_norm(h.mT, eps=1e-5),
    "group norm": lambda h: F.group_norm(h.mT, 2),
    "max over tokens": lambda h: h.amax(1) + h.max(1).values,
    "product over tokens": lambda h: h.prod(1),
    "determinants": lambda h: torch.linalg.det(
        h.mT @ h + 1e-3 * torch.eye(h.shape[-1], dtype=h.dtype)
    ),
    "sinc": lambda h: torch.sinc(_differences(h)),
    "inverse sigmoid": lambda h: torch.logit(h),
    "acos of cosines": lambda h: (0.9 * F.cosine_similarity(h[:, 1:], h[:, :-1], dim=-1)).acos(),
    "square root after attention": lambda h: (h - h.detach()).sqrt(),
    "unbound tokens": lambda h: torch.stack(
        [x / x.norm(dim=-1, keepdim=True) for x in h.unbind(1)], 1
    ),
    "blocks": lambda h: h[:, :6].unflatten(1, (3, 2)).norm(dim=2),
}
"""Each of hidden states [batch, tokens, width] with rows of zeros, and equal rows, among them."""
