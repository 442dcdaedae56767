"""The CUDA kernels' wrappers on a machine without a GPU.

Each of torch's operators and xformers' functions has a stand-in here that computes in float64 on
the CPU and insists on what the real one insists on: padded head dims, as many K/V heads as query
heads, aligned rows of a bias, its own shape of logsumexp. The wrappers must then give the reference
kernel's numbers; and torch's own shape functions must take their calls.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import ringfx
from ringfx import ops
from ringfx.backend import other_kernels
from ringfx.cost_model import choose as choose_layers
from ringfx.cost_model.measure import Effort, kernel_cases, masked_ns_per_pair
from ringfx.cost_model.profile import Direction, KernelRow, Profile
from ringfx.errors import RingfxError
from ringfx.kernel_table import TABLE, KernelChoice
from ringfx.ops import cuda, stats
from ringfx.ops.cuda import cudnn, efficient, flash, xformers
from ringfx.ops.kernels import MATH, Kernel, Scores, choose
from ringfx.plan import Plan
from tests.cost_model.sites import causal_site, shipped

Tensor = torch.Tensor

KERNELS = (
    flash.FLASH, flash.FLASH3, flash.FLASH4, cudnn.CUDNN, efficient.EFFICIENT, xformers.XFORMERS,
)  # fmt: skip


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


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> Torch:
    """torch's activation of FlashAttention 3 and 4, with packages that load."""
    found, module = Torch(), flash.attention
    monkeypatch.setattr(module, "current_flash_attention_impl", lambda: found.behind)
    monkeypatch.setattr(module, "activate_flash_attention_impl", found.put)
    monkeypatch.setattr(flash, "restore_flash_attention", lambda: found.put(None))
    return found


@pytest.fixture
def stand_ins(behind: Torch) -> Iterator[None]:
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
        (33, 1, 16, 16, False, False),
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


# --- which one is taken ---------------------------------------------------------------------------


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


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, behind: Torch) -> Iterator[Card]:
    """A Hopper card without extra packages."""
    monkeypatch.delenv(cuda.KERNEL_VARIABLE, raising=False)
    yield Card(monkeypatch)
    xformers.missing.cache_clear()
    flash._broken.cache_clear()


def _name(dtype: torch.dtype, **options: Any) -> str:
    return choose(torch.device("cuda"), dtype, **options).name


def test_without_a_plan_the_order_is_the_published_one(card: Card) -> None:
    types = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    assert [_name(x) for x in types] == ["cuda_cudnn", "cuda_cudnn", "cuda_efficient", "math"]
    assert _name(torch.bfloat16, soft_cap=True) == "math"
    card.has("flash_attn_interface", "flash_attn.cute")
    assert _name(torch.bfloat16) == "cuda_flash3"
    card.is_(100)
    assert _name(torch.bfloat16) == "cuda_flash4"
    card.is_(80)
    assert _name(torch.bfloat16) == "cuda_flash"
    card.is_(75)
    assert _name(torch.float16) == "cuda_efficient"
    assert _name(torch.bfloat16) == "math"
    card.is_(None)
    assert _name(torch.float16) == "cuda_flash3"


def test_gathered_keys_go_to_xformers_where_it_is_installed(card: Card) -> None:
    assert _name(torch.bfloat16, gathered=True) == "cuda_cudnn"
    card.has("xformers")
    assert _name(torch.bfloat16, gathered=True) == "cuda_xformers"
    assert _name(torch.bfloat16) == "cuda_cudnn"


def test_the_run_takes_what_the_plan_names(card: Card) -> None:
    for text in (
        "cuda_flash",
        "cuda_cudnn forward, cuda_flash backward",
        "cuda_cudnn (masked: cuda_efficient) forward, cuda_flash (masked: cuda_efficient) backward",
    ):
        assert _name(torch.bfloat16, named=text, head_dim=128) == text


def test_what_cannot_run_here_falls_to_the_next_that_can(card: Card, behind: Torch) -> None:
    device = torch.device("cuda")
    planned = "cuda_flash3 (masked: cuda_efficient)"

    def why(named: str = planned, head_dim: int = 128) -> str:
        found = cuda.refusals(named, device, torch.bfloat16, gathered=False, head_dim=head_dim)
        return "; ".join(found)

    assert _name(torch.bfloat16, named=planned) == "cuda_cudnn (masked: cuda_efficient)"
    assert why() == (
        "cuda_flash3 cannot run here: the package flash_attn_interface is not installed"
    )
    card.has("flash_attn_interface")
    assert _name(torch.bfloat16, named=planned) == planned
    assert why() == ""
    card.is_(80)
    assert _name(torch.bfloat16, named=planned) == "cuda_flash (masked: cuda_efficient)"
    assert "needs compute capability 9.x, and this card's is 8.0" in why()
    card.is_(90, cudnn_version=91002)
    assert _name(torch.bfloat16, named="cuda_cudnn") == "cuda_flash3"
    assert "cuDNN is 91002, and before 91501 it is wrong at some lengths" in why("cuda_cudnn")
    assert _name(torch.bfloat16, named="cuda_cudnn", head_dim=192) == "cuda_flash3"
    assert "head dim 192 is above its largest, 128" in why("cuda_cudnn", 192)
    assert _name(torch.bfloat16, named="cuda_magic") == "cuda_flash3"


def test_a_package_that_does_not_load_is_not_taken(card: Card, behind: Torch) -> None:
    def fails(name: str) -> None:
        raise ImportError("undefined symbol")

    card.has("flash_attn_interface")
    card.monkeypatch.setattr(flash.attention, "activate_flash_attention_impl", fails)
    assert _name(torch.bfloat16) == "cuda_cudnn"
    assert flash.missing3() == "torch cannot activate FA3: undefined symbol"


def test_a_kernel_can_be_forced(card: Card) -> None:
    card.monkeypatch.setenv(cuda.KERNEL_VARIABLE, "cuda_flash")
    assert _name(torch.float16) == "cuda_flash"
    assert _name(torch.float16, named="cuda_cudnn", gathered=True) == "cuda_flash"
    planned = "cuda_flash (masked: cuda_efficient)"
    assert _name(torch.float16, named="cuda_cudnn (masked: cuda_efficient)") == planned
    assert _name(torch.float64) == "math"
    card.monkeypatch.setenv(cuda.KERNEL_VARIABLE, "math")
    assert _name(torch.float16, named="cuda_cudnn (masked: cuda_efficient)") == "math"


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "said"),
    [
        ("cuda_cudnn", torch.float32, 64, "it takes float16 and bfloat16, and q is float32.*Do: "
         "name one of cuda_xformers, cuda_efficient, math"),
        ("cuda_magic", torch.float16, 64, "there is no such kernel for CUDA.*cuda_cudnn"),
        ("cpu_flash", torch.float16, 64, "there is no such kernel for CUDA"),
        ("cuda_cudnn", torch.float16, 192, "head dim 192 is above its largest, 128"),
        ("cuda_flash4", torch.float16, 64, "the package flash_attn.cute is not installed"),
    ],
)  # fmt: skip
def test_a_kernel_that_is_forced_and_cannot_run_is_an_error(
    card: Card, name: str, dtype: torch.dtype, head_dim: int, said: str
) -> None:
    card.monkeypatch.setenv(cuda.KERNEL_VARIABLE, name)
    with pytest.raises(RingfxError, match=rf"RINGFX_CUDA_KERNEL={name}: .*{said}"):
        _name(dtype, head_dim=head_dim)


def test_every_row_of_the_table_for_cuda_runs_and_refuses_by_its_limits() -> None:
    on_cuda = [name for name, limits in TABLE.items() if limits.device in ("cuda", "")]
    assert list(cuda.ROWS) == on_cuda
    assert all(row.limits.name == name for name, row in cuda.ROWS.items())


def test_a_calibration_measures_every_kernel_that_the_card_admits(card: Card) -> None:
    def measured() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for case in kernel_cases("cuda", Effort(max_tokens=64)):
            found.setdefault(case.dtype, set()).add(case.kernel)
        return found

    in_torch = {"cuda_cudnn", "cuda_flash", "cuda_efficient", "math"}
    halves = {"bfloat16": in_torch, "float16": in_torch}
    assert measured() == {**halves, "float32": {"cuda_efficient", "math"}}
    card.has("flash_attn_interface", "flash_attn.cute", "xformers")
    packages = {"cuda_flash3", "cuda_flash4", "cuda_xformers"}
    assert measured()["bfloat16"] == in_torch | packages
    card.is_(80)
    assert measured()["float16"] == in_torch | {"cuda_xformers"}
    assert masked_ns_per_pair("cuda", "cuda_cudnn", "forward", Effort()) == 0.0


@pytest.mark.usefixtures("stand_ins", "card")
def test_each_direction_and_masked_pieces_run_in_their_own_kernel(behind: Torch) -> None:
    """FlashAttention 3 forward, cuDNN backward; what has a mask goes to the efficient kernel."""
    text = "cuda_flash3 (masked: cuda_efficient) forward, cuda_cudnn (masked: math) backward"
    kernel = cuda._joined(KernelChoice.of(text))
    called: list[str] = []
    q, k, v, dout = _data(33, 50, 16, 16)
    for mask in (None, _mask(33, 50)):
        scores = Scores(scale=0.3, bias_BHQK=mask)
        with _noting(called):
            out, lse = kernel.forward(q, k, v, scores)
            found = kernel.backward(dout, q, k, v, out, lse, scores)
        expected = MATH.backward(dout, q, k, v, *MATH.forward(q, k, v, scores), scores)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert called == ["cuda_flash3", "cuda_cudnn", "cuda_efficient", "math"]
    assert behind.asked == ["FA3"]
    assert kernel.stores_scores


@contextlib.contextmanager
def _noting(called: list[str]) -> Iterator[None]:
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


@pytest.mark.usefixtures("stand_ins")
def test_each_flash_kernel_asks_torch_for_its_own_implementation(behind: Torch) -> None:
    q, k, v, dout = _data(33, 33, 16, 16)
    scores = Scores(scale=0.3)
    for kernel in (flash.FLASH, flash.FLASH3, flash.FLASH3, flash.FLASH4, flash.FLASH):
        out, lse = kernel.forward(q, k, v, scores)
        kernel.backward(dout, q, k, v, out, lse, scores)
    assert behind.asked == ["FA3", "FA4", "FA2"]


# --- the whole way: what the plan names runs ------------------------------------------------------


class Attention(torch.nn.Module):
    """Grouped heads, causal, and a window: pieces with and without a mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        near = (rows[:, None] >= rows) & (rows[:, None] - rows < 700)
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return causal + F.scaled_dot_product_attention(q, k, v, near, enable_gqa=True)


def _profile() -> Profile:
    """FlashAttention 2 is the fastest forward, cuDNN backward, and neither takes a mask."""
    rates = {"cuda_flash": (600, 300), "cuda_cudnn": (500, 400), "cuda_efficient": (100, 100)}
    rows = tuple(
        KernelRow(
            kernel=name, dtype="bfloat16", direction=direction, call_us=10, gflops=1e3 * rate,
            origin="made up",
        )
        for name, each in rates.items()
        for direction, rate in zip(get_args(Direction), each, strict=True)
    )  # fmt: skip
    return replace(shipped("h100-sxm-published"), kind="measured", kernels=rows)


@pytest.fixture
def on_a_card(card: Card, stand_ins: None) -> Iterator[list[str]]:
    """Attention on CPU tensors takes its kernel as on a GPU; the names of those that ran."""
    called: list[str] = []

    def chosen(device: torch.device, dtype: torch.dtype, **asked: Any) -> Kernel:
        asked = {name: asked[name] for name in ("gathered", "head_dim", "named")}
        return cuda.choose(torch.device("cuda"), dtype, **asked)

    functions = ops.attention.__globals__
    with _noting(called), mock.patch.dict(functions, choose=chosen):
        cuda._joined.cache_clear()
        yield called
    cuda._joined.cache_clear()


def _given() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 1024, 16), (1, 2, 1024, 16), (1, 2, 1024, 16))
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    return [x.requires_grad_() for x in values]


def _run(model: torch.nn.Module) -> list[Tensor]:
    given = _given()
    out = model(*given)
    out.float().square().sum().backward()
    return [out.detach(), *(x.grad for x in given if x.grad is not None)]


def test_the_run_takes_each_kernel_that_the_plan_named(
    on_a_card: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    stats.reset()
    expected = _run(Attention())
    model = ringfx.optimize(Attention(), compiler="eager", profile=_profile())
    found = _run(model)
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < 2e-2
    plan = ringfx.plan(Attention(), tuple(_given()), profile=_profile(), world_size=1)
    assert [layer.kernel for layer in plan.layers] == [
        "cuda_flash forward, cuda_cudnn backward",
        "cuda_flash (masked: cuda_efficient) forward, cuda_cudnn (masked: cuda_efficient) backward",
    ]
    forwards = [name for name in on_a_card if name != "cuda_cudnn"]
    assert set(forwards) == {"cuda_flash", "cuda_efficient"}
    assert {"cuda_cudnn", "cuda_efficient"} == set(on_a_card[on_a_card.index("cuda_cudnn") :])
    assert not [r for r in caplog.records if "the plan counts on" in r.getMessage()]


def test_a_planned_kernel_that_is_not_there_is_announced_once(
    on_a_card: list[str], card: Card, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    stats.reset()
    card.is_(90, cudnn_version=91002)
    model = ringfx.optimize(Attention(), compiler="eager", profile=_profile())
    for _ in range(2):
        _run(model)
    said = [r.getMessage() for r in caplog.records if "the plan counts on" in r.getMessage()]
    assert len(said) == 2, "one for each layer"
    assert "cuda_flash forward, cuda_cudnn backward kernel, and cuda_flash ran" in said[0]
    assert "cuda_cudnn" not in on_a_card


def test_the_announcement_says_why_the_planned_kernel_did_not_run(card: Card) -> None:
    stats.reset()
    (layer,) = choose_layers([causal_site()], world_size=1, profile=_profile())
    plan = Plan(
        world_size=1, gpu_memory=None, device="cuda", profile="x", profile_origin="x",
        layers=(replace(layer, kernel="cuda_flash3"),),
    )  # fmt: skip
    stats.layer(layer.name).ran = {"cuda_flash3": "cuda_cudnn"}
    (text,) = other_kernels(plan)
    assert "(cuda_flash3 cannot run here: the package flash_attn_interface is not in" in text
