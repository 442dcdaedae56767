"""A GPU's kernels and packages on a machine without one, for tests.

Each of torch's operators and xformers' functions has a stand-in that computes in float64 on the CPU
and insists on what the real one insists on: padded head dims, as many K/V heads as query heads,
aligned rows of a bias, its own shape of logsumexp.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from ringfx.ops.kernels import cuda
from ringfx.ops.kernels.cuda import flash, xformers
from ringfx.ops.kernels.kernel import MATH, Scores

__all__ = ["STAND_INS", "XFORMERS", "Card", "Torch", "data", "mask", "noting"]

Tensor = torch.Tensor


def _reference(scale: float, causal: bool, bias: Tensor | None) -> Scores:
    return Scores(scale=scale, causal=causal, bias_BHQK=bias)


def _insist(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> None:
    assert q.shape[1] == k.shape[1] == v.shape[1], "K/V heads are written out"
    assert all(x.shape[-1] % 8 == 0 for x in (q, k, v, *others)), "head dims are padded"


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _insist(q, k, v)
    assert q.shape[-1] == v.shape[-1] <= 256
    assert scale is not None
    out, lse = MATH.forward(q, k, v, _reference(scale, causal, None))
    none = torch.empty(0)
    return out, lse, none, none, q.shape[2], k.shape[2], none, none, none


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cum_q: Tensor,
    cum_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    seed: Tensor,
    offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    _insist(q, k, v, dout, out)
    assert (max_q, max_k) == (q.shape[2], k.shape[2])
    assert lse.shape == q.shape[:3]
    assert lse.isfinite().all()
    assert lse.is_contiguous()
    assert scale is not None
    return MATH.backward(dout, q, k, v, out, lse, _reference(scale, causal, None))


def _efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    wants_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _insist(q, k, v)
    assert wants_lse
    assert scale is not None
    _insist_on_bias(bias, q, k)
    out, lse = MATH.forward(q, k, v, _reference(scale, causal, bias))
    # What rows without a key hold is the kernel's affair: the wrapper must not read it.
    empty = lse == -math.inf
    out, lse = out.masked_fill(empty[..., None], math.nan), lse.masked_fill(empty, math.nan)
    return out, F.pad(lse, (0, -q.shape[2] % 32), value=math.inf), torch.empty(0), torch.empty(0)


def _insist_on_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    if bias is not None:
        assert bias.shape == (*q.shape[:3], k.shape[2])
        assert bias.stride(-1) == 1
        assert bias.stride(-2) % 16 == 0, "rows start aligned"


def _efficient_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout: float,
    wanted: list[bool],
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    _insist(q, k, v, dout, out)
    _insist_on_bias(bias, q, k)
    assert lse.shape[2] % 32 == 0
    assert wanted == [True, True, True, False]
    assert scale is not None
    lse = lse[..., : q.shape[2]]
    dq, dk, dv = MATH.backward(dout, q, k, v, out, lse, _reference(scale, causal, bias))
    return dq, dk, dv, torch.empty(0)


def _cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    wants_lse: bool,
    dropout: float = 0.0,
    causal: bool = False,
    debug: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    assert wants_lse
    assert bias is None
    assert q.shape[-1] <= 128
    assert k.shape[2] > 1
    found = _flash(q, k, v, dropout, causal, scale=scale)
    return found[0], found[1][..., None], *found[2:]


def _cudnn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    cum_q: Tensor | None,
    cum_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    assert lse.shape == (*q.shape[:3], 1)
    none = torch.empty(0)
    return _flash_backward(
        dout, q, k, v, out, lse[..., 0], none, none, max_q, max_k, dropout, causal, none, none,
        scale=scale,
    )  # fmt: skip


def _xformers_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: object, p: float, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    _insist(q, k, v)
    out, lse = MATH.forward(q, k, v, _reference(scale, attn_bias == "lower triangular", None))
    return out.transpose(1, 2), F.pad(lse, (0, -q.shape[2] % 32), value=math.inf)


def _xformers_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: object,
    p: float,
    scale: float,
) -> tuple[Tensor, ...]:
    dout, out, q, k, v = (x.transpose(1, 2) for x in (grad, output, query, key, value))
    assert lse.shape[:2] == q.shape[:2]
    assert lse.shape[2] >= q.shape[2]
    found = MATH.backward(
        dout, q, k, v, out, lse, _reference(scale, attn_bias == "lower triangular", None)
    )
    return tuple(x.transpose(1, 2) for x in found)


STAND_INS = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
}
XFORMERS = SimpleNamespace(
    memory_efficient_attention_forward_requires_grad=_xformers_forward,
    memory_efficient_attention_backward=_xformers_backward,
    LowerTriangularMask=lambda: "lower triangular",
)


class Torch:
    """What stands behind torch's flash operators, and what has stood there."""

    def __init__(self) -> None:
        self.behind: str | None = None
        self.asked: list[str] = []

    def put(self, name: str | None) -> None:
        self.behind = name
        self.asked.append(name or "FA2")


class Card:
    """A machine with a card: what it is, and what is installed beside torch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.is_(90)
        self.has()

    def is_(self, capability: int | None, cudnn_version: int = 91501) -> None:
        self.monkeypatch.setattr(cuda, "capability", lambda device: capability)
        self.monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        self.monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn_version)

    def has(self, *packages: str) -> None:
        self.monkeypatch.setattr(flash, "_installed", lambda module: module in packages)
        found = {"xformers": object()} if "xformers" in packages else {}
        self.monkeypatch.setattr(xformers.importlib.util, "find_spec", found.get)
        xformers.missing.cache_clear()
        flash._broken.cache_clear()


@contextlib.contextmanager
def noting(called: list[str]) -> Iterator[None]:
    """Each kernel's name when it is called."""

    def noted(name: str, run: Any) -> Any:
        return lambda *given: (called.append(name), run(*given))[1]

    rows = {
        name: replace(
            row,
            kernel=replace(
                row.kernel,
                forward=noted(name, row.kernel.forward),
                backward=noted(name, row.kernel.backward),
            ),
        )
        for name, row in cuda.ROWS.items()
    }
    with mock.patch.object(cuda, "ROWS", rows):
        yield


# --- tensors ------------------------------------------------------------------------------------


def data(Q: int, K: int, D: int, E: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    generator = torch.Generator().manual_seed(Q * K)
    return random(2, 6, Q, D), random(2, 3, K, D), random(2, 3, K, E), random(2, 6, Q, E)


def mask(Q: int, K: int) -> Tensor:
    """Every third pair hidden, and all of query 4's."""
    hidden = (torch.arange(Q)[:, None] + torch.arange(K)) % 3 == 0
    hidden[4] = True
    return torch.zeros(1, 1, Q, K, dtype=torch.float64).masked_fill(hidden, -math.inf)
