"""The CUDA kernels' wrappers on a machine without a GPU.

Each of torch's operators and xformers' functions has a stand-in here that computes in float64 on
the CPU and insists on what the real one insists on: padded head dims, as many K/V heads as query
heads, aligned rows of a bias, its own shape of logsumexp. The wrappers must then give the reference
kernel's numbers; and torch's own shape functions must take their calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from ringfx.errors import RingfxError
from ringfx.ops.kernels import cuda
from ringfx.ops.kernels.cuda import cudnn, efficient, flash, xformers
from ringfx.ops.kernels.kernel import MATH, Kernel, Scores, choose

Tensor = torch.Tensor

KERNELS = (flash.FLASH, flash.FLASH3, cudnn.CUDNN, efficient.EFFICIENT, xformers.XFORMERS)


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


@pytest.fixture
def stand_ins() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, stand_in in STAND_INS.items():
            library.impl(name, stand_in, "CPU")
        with mock.patch.object(xformers, "_operators", return_value=XFORMERS):
            yield


def _data(Q: int, K: int, D: int, E: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    generator = torch.Generator().manual_seed(Q * K)
    return random(2, 6, Q, D), random(2, 3, K, D), random(2, 3, K, E), random(2, 6, Q, E)


def _mask(Q: int, K: int) -> Tensor:
    """Every third pair hidden, and all of query 4's."""
    hidden = (torch.arange(Q)[:, None] + torch.arange(K)) % 3 == 0
    hidden[4] = True
    return torch.zeros(1, 1, Q, K, dtype=torch.float64).masked_fill(hidden, -math.inf)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    ("Q", "K", "D", "E", "causal", "masked"),
    [
        (33, 50, 20, 12, False, False),
        (41, 41, 12, 20, True, False),
        (64, 64, 16, 16, True, False),
        (33, 50, 20, 12, False, True),
        (33, 50, 300, 300, False, False),
    ],
)
def test_a_wrapper_gives_the_reference_kernels_numbers(
    kernel: Kernel, Q: int, K: int, D: int, E: int, causal: bool, masked: bool
) -> None:
    q, k, v, dout = _data(Q, K, D, E)
    scores = Scores(scale=0.3, causal=causal, bias_BHQK=_mask(Q, K) if masked else None)
    expected = MATH.forward(q, k, v, scores)
    found = kernel.forward(q, k, v, scores)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    out, lse = expected
    found = kernel.backward(dout, q, k, v, out, lse, scores)
    expected = MATH.backward(dout, q, k, v, out, lse, scores)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "kernel",
    [flash.FLASH, cudnn.CUDNN, efficient.EFFICIENT],
    ids=lambda kernel: kernel.name,
)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_torchs_shape_functions_take_the_calls(kernel: Kernel, masked: bool) -> None:
    q, k, v, dout = (
        torch.empty(2, heads, 40, 20, dtype=torch.bfloat16, device="meta") for heads in (6, 3, 3, 6)
    )
    bias = torch.empty(1, 1, 40, 40, device="meta") if masked else None
    scores = Scores(scale=0.3, bias_BHQK=bias)
    out, lse = kernel.forward(q, k, v, scores)
    assert out.shape == q.shape
    assert out.dtype == torch.bfloat16
    assert lse.shape == q.shape[:3]
    assert lse.dtype == torch.float32
    found = kernel.backward(dout, q, k, v, out, lse, scores)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A card without extra packages."""
    monkeypatch.delenv(cuda.KERNEL_VARIABLE, raising=False)
    monkeypatch.setattr(flash, "_installed", lambda: False)
    monkeypatch.setattr(xformers.importlib.util, "find_spec", lambda name: None)
    xformers.has_xformers.cache_clear()
    return monkeypatch


def _name(dtype: torch.dtype, **options: bool) -> str:
    return choose(torch.device("cuda"), dtype, **options).name


def test_a_card_without_packages_runs_torchs_own_kernels(card: pytest.MonkeyPatch) -> None:
    names = {dtype: _name(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)}
    assert list(names.values()) == ["cuda_flash", "cuda_efficient", "math"]
    assert _name(torch.bfloat16, gathered=True) == "cuda_flash"
    assert _name(torch.bfloat16, soft_cap=True) == "math"


def test_gathered_keys_go_to_xformers_where_it_is_installed(card: pytest.MonkeyPatch) -> None:
    card.setattr(xformers.importlib.util, "find_spec", lambda name: object())
    xformers.has_xformers.cache_clear()
    assert _name(torch.bfloat16, gathered=True) == "cuda_xformers"
    assert _name(torch.bfloat16) == "cuda_flash"
    xformers.has_xformers.cache_clear()


def test_a_hopper_card_with_its_package_runs_flash_attention_3(card: pytest.MonkeyPatch) -> None:
    activated: list[str] = []
    card.setattr(flash, "_installed", lambda: True)
    card.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    card.setattr(flash.attention, "activate_flash_attention_impl", activated.append)
    flash.activate_flash3.cache_clear()
    assert [_name(torch.bfloat16) for _ in range(2)] == ["cuda_flash3", "cuda_flash3"]
    assert activated == ["FA3"]
    card.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert _name(torch.bfloat16) == "cuda_flash"
    flash.activate_flash3.cache_clear()


def test_a_kernel_can_be_named(card: pytest.MonkeyPatch) -> None:
    card.setenv(cuda.KERNEL_VARIABLE, "cuda_cudnn")
    assert _name(torch.float16) == "cuda_cudnn"
    with pytest.raises(RingfxError, match=r"cuda_cudnn: no such kernel for torch.float32.*efficie"):
        _name(torch.float32)
