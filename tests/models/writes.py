"""Modules that write in place, one way each, between two attentions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.models.constructs import Around
from tests.models.shapes import HIDDEN

__all__ = ["BUFFERS", "REFUSED_WRITES", "WRITES", "RefusedWrites", "Writes", "WritesBuffers"]

Tensor = torch.Tensor


class Writes(Around):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def between(self, x: Tensor) -> Tensor:
        return WRITES[self.name](x * self.weight)


def base_read_after_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0].mul_(3)
    return y


def view_read_after_base(x: Tensor) -> Tensor:
    y = x * 2
    view = y.transpose(1, 2)
    y.mul_(3)
    return view.transpose(1, 2) + x


def view_of_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y.view(2, -1, 4, 6).transpose(1, 2)[:, 1, 2:, ::2].add_(1.5)
    return y


def sibling_views(x: Tensor) -> Tensor:
    y = x.clone()
    a, b = y[:, :4], y[:, 2:]
    a.mul_(2)
    b.add_(a[:, :1])
    a.sub_(b.mean())
    return y + F.pad(a, (0, 0, 0, x.shape[1] - 4))


def shift_right(x: Tensor) -> Tensor:
    """Bart's shift_tokens_right."""
    shifted = x.new_zeros(x.shape)
    shifted[:, 1:] = x[:, :-1].clone()
    shifted[:, 0] = 0.5
    return shifted.masked_fill_(shifted > 2, 1.0) + x


def by_mask(x: Tensor) -> Tensor:
    y = x.clone()
    y[x > 1] = 0.25
    y[:, torch.arange(x.shape[1]) % 2 == 0] = 0.75
    return y * x


def by_index(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, torch.tensor([0, 3])] = x[:, torch.tensor([1, 2])] * 2
    y[0, torch.tensor([5])] += 1
    return y * x


def by_step(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., 0::2] = x[..., 1::2]
    y[..., 1::2] = -x[..., 0::2]
    return y


def negative_places(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, -1] = x[:, 0]
    y[:, -3:-1] *= 2
    y[-1, -2, -5:] = 0
    return y


def swapped_halves(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :5], y[..., 5:10] = x[..., 5:10], x[..., :5]
    return y


def diagonal(x: Tensor) -> Tensor:
    y = x.clone()
    y.diagonal(0, 1, 2).mul_(3)
    return y


def unbound(x: Tensor) -> Tensor:
    y = x.clone()
    for i, row in enumerate(y[k] for k in range(2)):
        row.add_(i)
    return y


def loop(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        y[:, t] = x[:, t] + (y[:, t - 1] if t else 0)
    return y


def by_scatter(x: Tensor) -> Tensor:
    index = torch.arange(x.shape[1]).flip(0)[None, :, None].expand_as(x)
    y = x.clone().scatter_(1, index, x * 2)
    return y.index_add_(1, torch.tensor([1, 2]), x[:, :2]).index_fill_(1, torch.tensor([4]), 0.5)


def out_argument(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.empty_like(x)
        torch.mul(x, 2, out=y)
    return y + x


def flat_view(x: Tensor) -> Tensor:
    y = x.clone()
    y.view(-1)[::7] += 2
    y.flatten(1).unflatten(1, (-1, 8)).squeeze()[:, 0].neg_()
    return y


def shape_changed(x: Tensor) -> Tensor:
    y = x * 2
    y.unsqueeze_(0)
    y.mul_(2)
    return y.squeeze_(0).transpose_(1, 2).transpose(1, 2)


def promoted(x: Tensor) -> Tensor:
    """The written type stays: an integer is truncated, a small float rounded."""
    counts = torch.zeros(x.shape[1], dtype=torch.int64)
    counts += torch.arange(x.shape[1])
    small = torch.zeros(x.shape[1], dtype=torch.float32)
    small.copy_(counts.double() * 1.1)
    small += counts
    return x * small.double()[:, None]


def in_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.clone()
        y[:, 0] = 0
        y.clamp_(-1, 1)
    return x * y


def created_without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.zeros_like(x)
    view = y[:, 1:]
    view.copy_(x[:, 1:] * 2)
    return y + x + view.sum()


def detached_reader(x: Tensor) -> Tensor:
    y = x * 2
    seen = y.detach()
    y.mul_(x.mean())
    return y + seen


def accumulated(x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, 0])
    for t in range(3):
        total += x[:, t]
    return x + total[:, None]


def relu_inplace(x: Tensor) -> Tensor:
    y = F.relu(x * 2, inplace=True)
    return F.leaky_relu(y - 0.5, 0.1, inplace=True)


def copy_broadcast(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y.copy_(x[:1])
    y[1:].fill_(0.5)
    y[0].copy_(x[1, 0])
    return y.view(2, -1).view(x.shape) + x


def one_of_two(x: Tensor) -> Tensor:
    left, right = (x * 2).chunk(2, -1)
    left = left.clone()
    left.mul_(right)
    return torch.cat([left, right], -1)


def triangle(x: Tensor) -> Tensor:
    scores = x @ x.transpose(1, 2)
    scores.tril_().div_(x.shape[1])
    return scores @ x


def no_token_itself(x: Tensor) -> Tensor:
    """The tokens most like each other one."""
    scores = x[0] @ x[0].mT / x.shape[-1]
    hidden = torch.zeros_like(scores, dtype=torch.bool).fill_diagonal_(True)
    weights = scores.clone().fill_diagonal_(0.5).masked_fill(hidden, -9.0).softmax(-1)
    return x + weights @ x


def logical(x: Tensor) -> Tensor:
    keep = x > 0
    keep &= x < 1
    keep |= x < -1
    return x * keep


WRITES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "the base is read after its view was written": base_read_after_view,
    "a view is read after its base was written": view_read_after_base,
    "a view of a view of a view": view_of_a_view,
    "overlapping views": sibling_views,
    "shifted to the right": shift_right,
    "by a mask": by_mask,
    "by an index": by_index,
    "every second element": by_step,
    "counted from the end": negative_places,
    "two halves swapped": swapped_halves,
    "a diagonal": diagonal,
    "rows of an iteration": unbound,
    "token by token": loop,
    "scatter_, index_add_, index_fill_": by_scatter,
    "an out= argument": out_argument,
    "a flat view": flat_view,
    "unsqueeze_, squeeze_, transpose_": shape_changed,
    "types that stay": promoted,
    "inside no_grad": in_no_grad,
    "into what no_grad made": created_without_grad,
    "seen through detach": detached_reader,
    "a running total": accumulated,
    "activations in place": relu_inplace,
    "copy_ and fill_ with broadcasting": copy_broadcast,
    "one of two chunks": one_of_two,
    "tril_ of scores": triangle,
    "all but the diagonal": no_token_itself,
    "&= and |=": logical,
}  # fmt: skip


def without_gradient(x: Tensor) -> Tensor:
    y = x * 2
    with torch.no_grad():
        y.mul_(3)
    return y


def through_detach(x: Tensor) -> Tensor:
    y = x * 2
    y.detach().mul_(3)
    return y


def through_unfold(x: Tensor) -> Tensor:
    y = x.detach() * 2
    y.unfold(1, 2, 2).mul_(3)
    return y + x


WRITES_REFUSED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "without a gradient, into a value that has one": without_gradient,
    "through detach, into a value that has a gradient": through_detach,
    "through unfold": through_unfold,
}

REFUSED_WRITES: Mapping[str, tuple[str, str]] = {
    "without a gradient, into a value that has one": (
        "writes without gradients into a value that has a gradient",
        "later uses would pass on the gradient of the overwritten value",
    ),
    "through detach, into a value that has a gradient": (
        "through a detached view", "the same"
    ),
    "through unfold": ("aten.unfold.default, which has no inverse", "a view without an inverse"),
}  # fmt: skip


class RefusedWrites(Around):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def between(self, x: Tensor) -> Tensor:
        return WRITES_REFUSED[self.name](x)


class WritesBuffers(Around):
    """A buffer that is written in every call, beside others that are only read."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.norm: nn.Module = nn.Identity()
        if name in NORMS:
            self.norm = NORMS[name]()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.rand(HIDDEN))
        self.register_buffer("cache", torch.zeros(2, 9, HIDDEN))

    def between(self, x: Tensor) -> Any:
        return BUFFERS[self.name](self, x)


def counts(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return x / m.calls


def running_mean(m: Any, x: Tensor) -> Tensor:
    m.mean.lerp_(x.detach().mean((0, 1)), 0.1)
    return x - m.mean


def old_value_used(m: Any, x: Tensor) -> Tensor:
    """Backward needs the value that this call read, and a later write of this call spares it."""
    y = x * m.mean.clone()
    with torch.no_grad():
        m.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
    return y + m.mean


def cached(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.cache[:, 1 : 1 + x.shape[1]] = x
    return x + m.cache[:, : x.shape[1]]


def normalised(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.norm(x.transpose(1, 2)).transpose(1, 2)
    return result


NORMS: Mapping[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(HIDDEN),
    "BatchNorm, cumulative": lambda: nn.BatchNorm1d(HIDDEN, momentum=None),
    "BatchNorm without weights": lambda: nn.BatchNorm1d(HIDDEN, affine=False),
    "BatchNorm without statistics": lambda: nn.BatchNorm1d(HIDDEN, track_running_stats=False),
    "BatchNorm, evaluated": lambda: nn.BatchNorm1d(HIDDEN).eval(),
    "InstanceNorm": lambda: nn.InstanceNorm1d(HIDDEN, affine=True, track_running_stats=True),
    "InstanceNorm without statistics": lambda: nn.InstanceNorm1d(HIDDEN),
}

BUFFERS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "a counter": counts,
    "a running mean": running_mean,
    "a moving average whose old value is used": old_value_used,
    "a cache written by slice": cached,
    **dict.fromkeys(NORMS, normalised),
}
