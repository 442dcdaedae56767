"""Which kernel runs on a GPU: what the plan named, as far as the machine has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

import ringfx
from ringfx import ops
from ringfx.comm import stats
from ringfx.compile.runner import other_kernels
from ringfx.cost_model import choose as choose_layers
from ringfx.cost_model.calibration.measure import Effort, kernel_cases, masked_ns_per_pair
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.profile_rows import Direction, KernelRow
from ringfx.errors import RingfxError
from ringfx.ir.kernel_table import TABLE
from ringfx.ir.plan import Plan
from ringfx.ops.kernels import cuda
from ringfx.ops.kernels.cuda import flash
from ringfx.ops.kernels.kernel import Kernel, choose
from ringfx.strategies import STRATEGIES
from tests.cost_model.sites import causal_site, shipped
from tests.ops.cuda_stand_ins import Card, Torch, noting

Tensor = torch.Tensor


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
    assert _name(torch.bfloat16, all_keys=True) == "cuda_cudnn"
    card.has("xformers")
    assert _name(torch.bfloat16, all_keys=True) == "cuda_xformers"
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
        found = cuda.refusals(named, device, torch.bfloat16, all_keys=False, head_dim=head_dim)
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
    assert _name(torch.float16, named="cuda_cudnn", all_keys=True) == "cuda_flash"
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
        asked = {name: asked[name] for name in ("all_keys", "head_dim", "named")}
        return cuda.choose(torch.device("cuda"), dtype, **asked)

    functions = ops.attention.__globals__
    with noting(called), mock.patch.dict(functions, choose=chosen):
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
    assert not [r for r in caplog.records if "the plan expects" in r.getMessage()]


def test_a_planned_kernel_that_is_not_there_is_announced_once(
    on_a_card: list[str], card: Card, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    stats.reset()
    card.is_(90, cudnn_version=91002)
    model = ringfx.optimize(Attention(), compiler="eager", profile=_profile())
    for _ in range(2):
        _run(model)
    said = [r.getMessage() for r in caplog.records if "the plan expects" in r.getMessage()]
    assert len(said) == 2, "one for each layer"
    assert "cuda_flash forward, cuda_cudnn backward kernel, but cuda_flash ran" in said[0]
    assert "cuda_cudnn" not in on_a_card


def test_the_announcement_says_why_the_planned_kernel_did_not_run(card: Card) -> None:
    stats.reset()
    (layer,) = choose_layers([causal_site()], world_size=1, profile=_profile())
    plan = Plan(
        world_size=1, gpu_memory=None, device="cuda", profile="x", profile_origin="x",
        layers=(replace(layer, kernel="cuda_flash3"),),
    )  # fmt: skip
    stats.layer(layer.name).ran = {"cuda_flash3": "cuda_cudnn"}
    (text,) = other_kernels(plan, STRATEGIES)
    assert "(cuda_flash3 cannot run here: the package flash_attn_interface is not in" in text
