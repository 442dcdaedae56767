"""Calls of every operator in the element table, on sizes that differ from each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

Tensor = torch.Tensor
aten: Any = torch.ops.aten
GENERATOR = torch.Generator().manual_seed(0)
Q, K = 5, 7


def integers(*shape: int, low: int = -4, high: int = 9) -> Tensor:
    return torch.randint(low, high, shape, generator=GENERATOR)


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def booleans(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR) < 0.5


@dataclass(frozen=True, eq=False)
class Sample:
    name: str
    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...] = ()


def positions(q_len: int = Q, kv_len: int = K) -> tuple[Tensor, Tensor]:
    return torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]


def distance() -> Tensor:
    rows, columns = positions()
    return rows - columns


def _binary() -> Iterator[Sample]:
    pairs = {
        "integers": (integers(Q, K), integers(K)),
        "floats": (floats(Q, K), floats(Q, 1)),
        "mixed": (integers(Q, K), floats(K)),
    }
    names = ("add", "sub", "mul", "le", "lt", "ge", "gt", "eq", "ne", "less", "less_equal")
    names += ("greater", "greater_equal", "not_equal", "minimum", "maximum")
    for name in names:
        op = getattr(torch, name)
        for kind, pair in pairs.items():
            yield Sample(f"{name} of {kind}", op, pair)
            yield Sample(
                f"{name} of {kind} and positions",
                lambda a, b, f=op: f(a, distance().to(a.dtype)),
                pair,
            )
    for name in ("add", "sub", "mul", "le", "lt", "ge", "gt", "eq", "ne", "rsub"):
        scalar = getattr(torch, name)
        yield Sample(f"{name} with a number", lambda f=scalar: f(distance(), 2))
        yield Sample(f"{name} with a fraction", lambda a, f=scalar: f(a, 0.3), (floats(Q, K),))
        overload = getattr(getattr(aten, name), "Scalar", None)
        if overload is not None:
            yield Sample(f"{name}.Scalar", lambda f=overload: f(distance(), 2))
    for name in ("less", "less_equal", "greater", "greater_equal"):
        overload = getattr(aten, name).Scalar
        yield Sample(f"{name}.Scalar", lambda f=overload: f(distance(), 2))
    for name in ("add", "sub", "rsub"):
        scaled = getattr(torch, name)
        yield Sample(
            f"{name} with alpha", lambda a, f=scaled: f(distance(), a, alpha=3), (integers(K),)
        )
    for name in ("remainder", "fmod", "floor_divide"):
        op = getattr(torch, name)
        yield Sample(f"{name} of positions", lambda f=op: f(distance(), 3))
        yield Sample(
            f"{name} of tensors", getattr(torch, name), (integers(Q, K), integers(K, low=1))
        )
    for mode in (None, "floor", "trunc"):
        yield Sample(f"div {mode}", lambda m=mode: torch.div(distance(), 3, rounding_mode=m))
        yield Sample(
            f"div {mode} of tensors",
            lambda a, b, m=mode: torch.div(a, b, rounding_mode=m),
            (integers(Q, K), integers(K, low=1)),
        )
        yield Sample(
            f"div.Scalar {mode}",
            lambda m=mode: (
                aten.div.Scalar_mode(distance(), 3, rounding_mode=m)
                if m
                else aten.div.Scalar(distance(), 3)
            ),
        )
    yield Sample("floor_divide.Scalar", lambda: aten.floor_divide.Scalar(distance(), 3))
    for name in ("min", "max"):
        op = getattr(torch, name)
        yield Sample(f"{name} of two", op, (integers(Q, K), integers(K)))
    yield Sample("pow", lambda: distance() ** 2)
    yield Sample("pow of tensors", torch.pow, (integers(Q, K, low=0), integers(K, low=0, high=3)))
    yield Sample("pow of a number", lambda: 2.0 ** -distance())
    yield Sample("square", lambda: torch.square(distance()))
    yield Sample("softplus", lambda: torch.nn.functional.softplus(distance() * 0.5))
    yield Sample("aten square", lambda: aten.square.default(distance()))


def _logic() -> Iterator[Sample]:
    a, b = booleans(Q, K), booleans(K)
    for name in ("logical_and", "logical_or", "logical_xor"):
        yield Sample(name, getattr(torch, name), (a, b))
    for symbol in ("__and__", "__or__", "__xor__", "bitwise_and", "bitwise_or", "bitwise_xor"):
        op = getattr(aten, symbol).Tensor
        number = getattr(aten, symbol).Scalar
        yield Sample(f"{symbol} of booleans", op, (a, b))
        yield Sample(f"{symbol} of integers", op, (integers(Q, K), integers(K)))
        yield Sample(f"{symbol} with a number", lambda f=number: f(distance(), 5))
    yield Sample("not", lambda x: ~x, (a,))
    yield Sample("logical_not", torch.logical_not, (integers(Q, K),))
    yield Sample("sum of booleans", lambda x, y: x + y, (a, b))
    yield Sample("product of booleans", lambda x, y: x * y, (a, b))
    yield Sample("greatest of booleans", torch.maximum, (a, b))
    yield Sample("booleans counted", lambda x, y: x.int() + y.int(), (a, b))


def _unary() -> Iterator[Sample]:
    names = ("neg", "abs", "exp", "log", "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "tanh")
    names += (
        "sigmoid",
        "relu",
        "sin",
        "cos",
        "sign",
        "sgn",
        "floor",
        "ceil",
        "round",
        "trunc",
        "fix",
    )
    for name in names:
        positive = floats(Q, K).abs() + 0.1
        yield Sample(name, getattr(torch, name), (positive,))
    yield Sample("exp of positions", lambda: torch.exp(distance().float() * 0.1))
    special = torch.tensor([[1.0, -torch.inf, torch.nan], [torch.inf, 0.0, -1.0]])
    for name in ("isinf", "isnan", "nan_to_num"):
        yield Sample(name, getattr(torch, name), (special,))
    yield Sample("nan_to_num to numbers", lambda x: torch.nan_to_num(x, 1.0, 2.0, 3.0), (special,))
    for name in ("contiguous", "clone", "alias", "positive", "detach", "lift_fresh_copy"):
        op = getattr(aten, name).default
        yield Sample(name, lambda x, f=op: f(x), (floats(Q, K),))


def _casts() -> Iterator[Sample]:
    types = (torch.bool, torch.int64, torch.int32, torch.float32, torch.float64)
    types += (torch.float16, torch.bfloat16)
    for dtype in types:
        yield Sample(f"to {dtype}", lambda d=dtype: (distance() >= 0).to(d))
        yield Sample(f"positions to {dtype}", lambda d=dtype: distance().to(d))
        yield Sample(f"floats to {dtype}", lambda x, d=dtype: x.to(d), (floats(Q, K),))
        yield Sample(
            f"a product in {dtype}",
            lambda d=dtype: (
                (1 - (distance() >= 0).to(d)) * 3 if d != torch.bool else distance() > 1
            ),
        )
    yield Sample("to a device", lambda x: x.to("cpu", torch.float64), (floats(Q, K),))
    yield Sample(
        "aten to.device", lambda x: aten.to.device(x, "cpu", torch.float64), (floats(Q, K),)
    )
    yield Sample("aten to.other", aten.to.other, (integers(Q, K), floats(K)))
    yield Sample(
        "aten to.dtype_layout", lambda x: aten.to.dtype_layout(x, dtype=torch.float64), (floats(Q),)
    )
    yield Sample("_to_copy", lambda x: aten._to_copy.default(x, dtype=torch.int64), (floats(Q, K),))
    yield Sample("type_as", lambda x, y: aten.type_as.default(x, y), (integers(Q, K), floats(K)))
    yield Sample("small integers", lambda: (distance() >= 0).to(torch.uint8) * 3)


def _choices() -> Iterator[Sample]:
    yield Sample("where", torch.where, (booleans(Q, K), floats(K), floats(Q, 1)))
    yield Sample("where of numbers", lambda: torch.where(distance() >= 0, 0.0, -torch.inf))
    yield Sample(
        "where, number first", lambda x: torch.where(distance() >= 0, 1.5, x), (floats(K),)
    )
    yield Sample("where, number last", lambda x: torch.where(distance() >= 0, x, 1.5), (floats(K),))
    yield Sample("aten where.Scalar", lambda: aten.where.Scalar(distance() >= 0, 1, 0))
    yield Sample("masked_fill", lambda x: x.masked_fill(distance() < 0, -1e9), (floats(Q, K),))
    yield Sample(
        "masked_fill by a tensor",
        lambda x, y: x.masked_fill(distance() < 0, y),
        (floats(Q, K), torch.tensor(2.5)),
    )
    for name, call in {
        "clamp": lambda: distance().clamp(-2, 3),
        "clamp by tensors": lambda: distance().clamp(torch.tensor(-2), torch.tensor(3)),
        "clamp_min": lambda: distance().clamp_min(0),
        "clamp_max": lambda: distance().clamp_max(0),
        "clip": lambda: torch.clip(distance(), max=1),
        "aten clip": lambda: aten.clip.default(distance(), -1, 1),
        "aten clip.Tensor": lambda: aten.clip.Tensor(distance(), torch.tensor(-1)),
        "clamp_min by a tensor": lambda: aten.clamp_min.Tensor(distance(), torch.tensor(-1)),
        "clamp_max by a tensor": lambda: aten.clamp_max.Tensor(distance(), torch.tensor(1)),
        "clamp by a fraction": lambda: (distance() / 3).clamp(max=0.3),
    }.items():
        yield Sample(name, call)


def _views() -> Iterator[Sample]:
    x = floats(2, 3, Q, K)
    for name, call in {
        "expand": lambda x: x[:, :1].expand(2, 3, -1, -1),
        "expand_as": lambda x: aten.expand_as.default(x[:, :1], x),
        "broadcast_to": lambda x: aten.broadcast_to.default(x[:, :1], [2, 3, Q, K]),
        "unsqueeze": lambda x: x[0, 0].unsqueeze(1),
        "transpose": lambda x: x.transpose(1, -1),
        "swapaxes": lambda x: aten.swapaxes.default(x, 1, -1),
        "swapdims": lambda x: aten.swapdims.default(x, 0, -2),
        "t": lambda x: x[0, 0].t(),
        "mT": lambda x: aten.mT.default(x),
        "adjoint": lambda x: aten.adjoint.default(x),
        "numpy_T": lambda x: aten.numpy_T.default(x),
        "permute": lambda x: x.permute(3, 0, -2, 1),
        "merged": lambda x: x.reshape(6, Q * K),
        "split": lambda x: x.flatten().view(3, 2, K, Q),
        "regrouped": lambda x: x.view(2, 3 * Q, K).unflatten(1, (Q, 3)),
        "view_as": lambda x: aten.view_as.default(x, x.new_empty(3, 2, K, Q)),
        "reshape_as": lambda x: aten.reshape_as.default(x, x.new_empty(3, 2, K, Q)),
        "ravel": lambda x: aten.ravel.default(x)[5:],
        "flatten": lambda x: aten.flatten.using_ints(x, 1, 2),
        "unflatten": lambda x: aten.unflatten.int(x[0], 0, [3, 1]),
        "_unsafe_view": lambda x: aten._unsafe_view.default(x, [6, Q, K]),
        "squeeze": lambda x: aten.squeeze.default(x[:1, :1]),
        "squeeze.dim": lambda x: x[:, :1].squeeze(1),
        "squeeze.dims": lambda x: x[:1, :1].squeeze((0, 1)),
        "slice": lambda x: x[:, 1:, :-1, -4:],
        "steps": lambda x: x[..., 1::2],
        "select": lambda x: x[1, -1],
        "flip": lambda x: x.flip(-1, 1),
        "roll": lambda x: x.roll((2, -1), (-1, 2)),
        "repeat": lambda x: x[0].repeat(2, 1, 2, 1),
        "repeat_interleave": lambda x: aten.repeat_interleave.self_int(x, 2, 1),
        "unfold": lambda x: x[0].unfold(1, 3, 2),
        "diagonal": lambda x: x.diagonal(1, -2, -1),
        "diagonal below": lambda x: x.diagonal(-2, 2, 3),
        "tril": lambda x: x.tril(1),
        "triu": lambda x: x.triu(-1),
        "split in two": lambda x: x.split(3, -1)[1],
        "split by sizes": lambda x: x.split([2, 5], -1)[1],
        "split_with_sizes": lambda x: aten.split_with_sizes.default(x, [2, 5], -1)[1],
        "chunk": lambda x: x.chunk(2, 2)[-1],
        "unbind": lambda x: x.unbind(1)[2],
    }.items():
        yield Sample(name, call, (x,))


def _creation() -> Iterator[Sample]:
    for name, call in {
        "full": lambda: torch.full((Q, K), 0.1) + distance(),
        "full of a tensor": lambda: torch.full((Q, K), 3) + distance(),
        "new_full": lambda: distance().new_full((Q, K), 3) + distance(),
        "full_like": lambda: torch.full_like(distance(), 3) * distance(),
        "ones": lambda: torch.ones(Q, K) * distance(),
        "new_ones": lambda: distance().new_ones(Q, K) * distance(),
        "ones_like": lambda: torch.ones_like(distance()) * distance(),
        "zeros": lambda: torch.zeros(Q, K) + distance(),
        "new_zeros": lambda: distance().new_zeros(Q, K) + distance(),
        "zeros_like": lambda: torch.zeros_like(distance()) + distance(),
        "zero": lambda: aten.zero.default(distance()) + distance(),
        "fill": lambda: aten.fill.Scalar(distance(), 2) + distance(),
        "fill by a tensor": lambda: aten.fill.Tensor(distance(), torch.tensor(2)) + distance(),
        "scalar_tensor": lambda: torch.scalar_tensor(2.0) * distance(),
        "arange": lambda: torch.arange(Q)[:, None] + torch.arange(K),
        "arange.start": lambda: torch.arange(2, 2 + Q)[:, None] * torch.arange(K),
        "arange.start_step": lambda: torch.arange(9, 9 - 2 * Q, -2)[:, None] + torch.arange(K),
        "arange of floats": lambda: (
            torch.arange(Q, dtype=torch.float32)[:, None] / torch.arange(1, 1 + K)
        ),
        "arange of doubles": lambda: (
            torch.arange(Q, dtype=torch.float64)[:, None] / torch.arange(1, 1 + K)
        ),
        "arange of fractions": lambda: torch.arange(0, 1, 0.25)[:, None] * torch.arange(K),
        "linspace": lambda: torch.linspace(0, 1, Q)[:, None] * torch.arange(K),
        "eye": lambda: torch.eye(Q),
        "eye of two sizes": lambda: torch.eye(Q, K, dtype=torch.bool),
    }.items():
        yield Sample(name, call)


def _indexing() -> Iterator[Sample]:
    table, matrix = floats(11, 3), floats(2, Q, K)
    ids = integers(2, Q, low=0, high=K)
    for name, call, *inputs in (
        ("index", lambda t: t[distance() + 6], table),
        ("negative index", lambda t: t[distance()], table),
        ("negative index of positions", lambda: torch.arange(11)[distance()]),
        ("two indices", lambda m: m[:, positions()[0], positions()[1] % 3], matrix),
        (
            "two indices apart",
            lambda m: m[torch.tensor([1, 0])[:, None], :, positions()[1][0, :3]],
            matrix,
        ),
        ("all indices", lambda m: m[1, positions()[0], positions()[1]], matrix),
        (
            "index of a computed value",
            lambda m: (m * 2)[0][positions()[0], -positions()[1] - 1],
            matrix,
        ),
        ("index by ids", lambda t, i: t[i], table, ids),
        ("index_select", lambda m: m.index_select(1, torch.tensor([3, 0, 3])), matrix),
        ("gather", lambda m, i: m.gather(2, i[:, :, None].expand(-1, -1, 4)), matrix, ids),
        ("take_along_dim", lambda m, i: torch.take_along_dim(m, i[:, :, None], 2), matrix, ids),
        ("embedding", lambda t: F.embedding(distance() + 6, t).permute(2, 0, 1), table),
        ("take", lambda t: t.flatten().take(distance().abs()), table),
        ("cat", lambda m: torch.cat([m[:, :2], m, -m[:, :1]], 1), matrix),
        ("cat of columns", lambda m: torch.cat([m, m[..., :3] * 2], -1), matrix),
        (
            "cat of positions",
            lambda: torch.cat([positions()[1], positions()[1].flip(1)], 1) - positions()[0],
        ),
        ("cat with nothing", lambda m: torch.cat([m[:, :0], m], 1), matrix),
        ("concat", lambda m: aten.concat.default([m, m], 0), matrix),
        ("concatenate", lambda m: aten.concatenate.default([m, m], 0), matrix),
        ("stack", lambda m: torch.stack([m, m + 1], 1), matrix),
        ("diff", lambda m: m.diff(dim=1), matrix),
        ("diff, prepended", lambda i: i.diff(dim=1, prepend=i[:, :1] - 1), ids),
        ("diff, appended", lambda i: i.diff(dim=1, append=i[:, :2]), ids),
        ("diff of booleans", lambda i: (i > 2).diff(dim=1), ids),
        ("pad", lambda m: F.pad(m, (1, 2, 0, 1), value=3.0), matrix),
        ("pad and crop", lambda m: F.pad(m, (-1, 2), value=3.0), matrix),
        ("aten pad", lambda m: aten.pad.default(m, [1, 1]), matrix),
        ("constant_pad_nd", lambda m: aten.constant_pad_nd.default(m, [2, 0], 1.0), matrix),
        ("slice_scatter", lambda m: m.slice_scatter(m[:, :2] * 2, 1, 1, 3), matrix),
        ("slice_scatter to the end", lambda m: m.slice_scatter(m[..., :2], 2, -2), matrix),
        ("select_scatter", lambda m: m.select_scatter(m[:, 1] * 2, 1, -1), matrix),
        ("copy", lambda m: aten.copy.default(m, m[:, :1]), matrix),
        ("bmm of positions()[1] and rows", lambda i: i[:, :, None].bmm(i[:, None, :]), ids),
        ("mm of positions()[1] and rows", lambda m: m[0][:, :1].mm(m[1][:1]), matrix),
        ("matmul of positions()[1] and rows", lambda i: i[:, :, None] @ i[:, None, :], ids),
        ("outer", lambda m: torch.outer(m[0, 0], m[1, 1]), matrix),
        ("aten outer", lambda m: aten.outer.default(m[0, 0], m[1, 1]), matrix),
        ("aten ger", lambda m: aten.ger.default(m[0, 0], m[1, 1]), matrix),
    ):
        yield Sample(name, call, tuple(inputs))


SAMPLES = tuple(
    sample
    for family in (_binary, _logic, _unary, _casts, _choices, _views, _creation, _indexing)
    for sample in family()
)
