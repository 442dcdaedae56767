"""Which kernel a layer takes, with made-up profiles of several: the fastest that admits it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from ringfx.cost_model import choose
from ringfx.cost_model.prediction.kernel_choice import unpriced
from ringfx.cost_model.prediction.profile import Profile, profile_json, read_profile
from ringfx.cost_model.prediction.profile_rows import KernelRow
from ringfx.errors import RingfxError
from ringfx.ir import tiles
from ringfx.ir.attention_spec import AttentionSpec
from ringfx.ir.kernel_table import KERNEL_VARIABLE, KernelChoice, Pick
from ringfx.ir.plan import Plan
from ringfx.ir.values import AttentionSite
from ringfx.report.plan_html import to_html
from ringfx.report.plan_views import diff_text, strategy_options_text
from tests.cost_model.sites import causal_site, full_site, predicted, shipped

H100 = shipped("h100-sxm-published")
SINGLES, HALVES = ("float32",), ("bfloat16", "float16")

FLASH = ("cuda_flash", HALVES, 300, 280)
FLASH3 = ("cuda_flash3", HALVES, 600, 560)
CUDNN = ("cuda_cudnn", HALVES, 550, 450)
EFFICIENT = ("cuda_efficient", (*HALVES, *SINGLES), 150, 120)
MATH = ("math", (*HALVES, *SINGLES), 60, 50)


def _profile(*kernels: tuple[str, Iterable[str], float, float], **changes: Any) -> Profile:
    """TFLOP/s of each kernel, forward and backward, for some types."""
    rows = tuple(
        KernelRow(
            kernel=name, dtype=dtype, direction=direction, call_us=10, gflops=1e3 * tflops,
            origin="made up",
        )
        for name, dtypes, forward, backward in kernels
        for dtype in dtypes
        for direction, tflops in (("forward", forward), ("backward", backward))
    )  # fmt: skip
    measured: dict[str, Any] = {"kind": "measured", "kernels": rows, "fused_kernel": kernels[0][0]}
    return replace(H100, **{**measured, **changes})


def _windowed(**changes: Any) -> AttentionSite:
    window = ("and", tiles.CAUSAL, ("gt", tiles.K, ("sub", tiles.Q, ("const", 4096))))
    spec = AttentionSpec(scale=0.1, q_len=32768, kv_len=32768, keep=window)
    return causal_site(tokens=32768, spec=spec, balanced=True, density=0.12, **changes)


def _kernel(site: AttentionSite, profile: Profile, strategy: str = "production") -> str:
    return predicted(site, strategy, 4, profile).kernel


@pytest.mark.parametrize("strategy", ["production", "collective", "ulysses"])
def test_the_fastest_that_admits_is_taken(strategy: str) -> None:
    profile = _profile(FLASH, CUDNN, FLASH3, EFFICIENT, MATH)
    assert _kernel(causal_site(), profile, strategy) == "cuda_flash3"
    assert _kernel(causal_site(), _profile(FLASH, CUDNN, EFFICIENT, MATH), strategy) == "cuda_cudnn"
    assert _kernel(causal_site(dtype="float32"), profile, strategy) == "cuda_efficient"
    assert _kernel(causal_site(dtype="float64"), profile, strategy) == "math"


def test_each_direction_has_its_own_fastest() -> None:
    profile = _profile(("cuda_flash", HALVES, 600, 300), ("cuda_cudnn", HALVES, 500, 400), MATH)
    found = predicted(causal_site(), "production", 4, profile)
    assert found.kernel == "cuda_flash forward, cuda_cudnn backward"
    each = [
        predicted(causal_site(), "production", 4, _profile(row, MATH))
        for row in (("cuda_flash", HALVES, 600, 300), ("cuda_cudnn", HALVES, 500, 400))
    ]
    assert found.forward_ms == min(p.forward_ms for p in each)
    assert found.backward_ms == min(p.backward_ms for p in each)
    alone = predicted(causal_site(trains=False), "production", 4, profile)
    assert alone.kernel == "cuda_flash"


def test_what_starts_faster_is_taken_for_what_is_short() -> None:
    profile = _profile(FLASH, CUDNN, MATH)
    slow_start = tuple(
        replace(row, call_us=200) if row.kernel == "cuda_cudnn" else row for row in profile.kernels
    )
    profile = replace(profile, kernels=slow_start)
    assert _kernel(causal_site(tokens=256), profile) == "cuda_flash"
    assert _kernel(causal_site(tokens=2**18), profile) == "cuda_cudnn"


def test_torchs_flash_operators_are_given_to_one_implementation_in_a_layer() -> None:
    flash2, flash3 = ("cuda_flash", HALVES, 600, 300), ("cuda_flash3", HALVES, 500, 400)
    assert _kernel(causal_site(), _profile(flash2, flash3, MATH)) == "cuda_flash3"
    both = _profile(flash2, flash3, ("cuda_cudnn", HALVES, 100, 390), MATH)
    assert _kernel(causal_site(), both) == "cuda_flash forward, cuda_cudnn backward"


def test_a_mask_is_for_kernels_that_take_one_and_the_rest_for_the_fastest() -> None:
    profile = _profile(FLASH, CUDNN, EFFICIENT, MATH)
    found = predicted(_windowed(), "production", 4, profile)
    assert found.kernel == "cuda_cudnn (masked: cuda_efficient)"
    slower = predicted(_windowed(), "production", 4, _profile(EFFICIENT, MATH))
    unmasked = predicted(_windowed(), "production", 4, _profile(CUDNN, MATH))
    assert slower.kernel == "cuda_efficient"
    assert found.compute_ms < slower.compute_ms
    assert unmasked.kernel == "cuda_cudnn (masked: math)"


def test_what_data_mask_is_priced_by_the_kernel_of_masked_pieces() -> None:
    documents = ("eq", ("at", 0, tiles.Q), ("at", 0, tiles.K))
    spec = AttentionSpec(scale=0.1, q_len=8192, kv_len=8192, keep=("and", tiles.CAUSAL, documents))
    site = causal_site(spec=spec)
    mixed = predicted(site, "production", 4, _profile(CUDNN, EFFICIENT, MATH))
    alone = predicted(site, "production", 4, _profile(EFFICIENT, MATH))
    assert mixed.kernel == "cuda_cudnn (masked: cuda_efficient)"
    assert mixed.total_ms == alone.total_ms


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "cuda_cudnn"),
        ({"head_dim": 192, "v_head_dim": 128}, "cuda_flash"),
        ({"head_dim": 128, "v_head_dim": 256}, "cuda_flash"),
        ({"head_dim": 320, "v_head_dim": 320}, "cuda_efficient"),
        ({"dtype": "float32"}, "cuda_efficient"),
    ],
)
def test_head_dims_and_types_bar_kernels(changes: dict[str, Any], expected: str) -> None:
    assert _kernel(causal_site(**changes), _profile(FLASH, CUDNN, EFFICIENT, MATH)) == expected


def test_the_cards_capability_bars_kernels() -> None:
    kernels = (FLASH, CUDNN, FLASH3, EFFICIENT, MATH)
    assert _kernel(causal_site(), _profile(*kernels, capability="8.0")) == "cuda_cudnn"
    assert _kernel(causal_site(), _profile(*kernels, capability="")) == "cuda_flash3"
    old = _profile(*kernels, capability="7.5")
    assert _kernel(causal_site(dtype="float16"), old) == "cuda_efficient"
    assert _kernel(causal_site(), old) == "math"


def test_gathered_keys_may_go_to_a_kernel_that_is_for_them() -> None:
    profile = _profile(("cuda_xformers", (*HALVES, *SINGLES), 900, 900), FLASH, MATH)
    assert _kernel(causal_site(), profile, "collective") == "cuda_xformers"
    assert _kernel(causal_site(), profile, "production") == "cuda_flash"


def test_products_that_are_kept_soft_caps_and_dropout_are_for_the_reference() -> None:
    profile, site = _profile(FLASH, CUDNN, MATH), full_site()
    assert _kernel(site, profile, "simple") == "math"
    assert _kernel(replace(site, spec=replace(site.spec, soft_cap=30.0)), profile) == "math"
    assert _kernel(replace(site, spec=replace(site.spec, dropout=0.1)), profile) == "math"


@pytest.mark.parametrize("name", ["h100-sxm-published", "h200-sxm-published"])
def test_published_figures_give_the_best_that_torch_itself_can_call(name: str) -> None:
    profile = shipped(name)
    assert _kernel(causal_site(), profile) == "cuda_cudnn"
    assert _kernel(causal_site(), replace(profile, kind="measured")) == "cuda_flash3"
    assert _kernel(causal_site(), shipped("a100-sxm-published")) == "cuda_flash"
    for kernel, published in (("cuda_cudnn", 505), ("cuda_flash3", 610)):
        forward, backward = (
            profile.kernel(kernel, "bfloat16", direction).gflops / 1e3
            for direction in ("forward", "backward")  # type: ignore[arg-type]
        )
        assert 3.5 / (1 / forward + 2.5 / backward) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("name", ["cpu-default", "amd-epyc-2-ranks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_cpu_has_one_fused_kernel_masks_included(name: str, dtype: str) -> None:
    for site in (causal_site(), _windowed()):
        on_cpu = replace(site, dtype=dtype, device="cpu")
        assert _kernel(on_cpu, shipped(name)) == "cpu_flash"


# --- the user's word ----------------------------------------------------------------------------


def test_a_forced_kernel_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = _profile(FLASH, CUDNN, EFFICIENT, MATH)
    monkeypatch.setenv(KERNEL_VARIABLE, "cuda_flash")
    assert _kernel(causal_site(), profile) == "cuda_flash"
    assert _kernel(_windowed(), profile) == "cuda_flash (masked: cuda_efficient)"
    assert _kernel(causal_site(dtype="float64"), profile) == "math"
    monkeypatch.setenv(KERNEL_VARIABLE, "cuda_efficient")
    assert _kernel(_windowed(), profile) == "cuda_efficient"
    cpu = causal_site(dtype="float32", device="cpu")
    assert _kernel(cpu, shipped("cpu-default")) == "cpu_flash"


def test_a_forced_kernel_that_does_not_take_the_layer_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KERNEL_VARIABLE, "cuda_cudnn")
    with pytest.raises(RingfxError, match=r"KERNEL=cuda_cudnn: head dim 256 is above.*cuda_flash"):
        _kernel(causal_site(head_dim=256), _profile(FLASH, CUDNN, MATH))
    monkeypatch.setenv(KERNEL_VARIABLE, "magic")
    with pytest.raises(RingfxError, match=r"KERNEL=magic: there is no such kernel for CUDA"):
        _kernel(causal_site(), _profile(FLASH, CUDNN, MATH))


def test_a_forced_kernel_without_figures_is_priced_as_another_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile = _profile(FLASH, CUDNN, MATH)
    monkeypatch.setenv(KERNEL_VARIABLE, "cuda_flash3")
    layers = choose([causal_site()], world_size=4, profile=profile)
    assert layers[0].kernel == "cuda_flash3"
    (note,) = unpriced(layers, profile)
    assert note.endswith(
        "has no figures for cuda_flash3: the figures of cuda_flash are used instead"
    )
    monkeypatch.delenv(KERNEL_VARIABLE)
    assert unpriced(choose([causal_site()], world_size=4, profile=profile), profile) == ()


# --- the plan names it --------------------------------------------------------------------------


def _plan(profile: Profile, *sites: AttentionSite) -> Plan:
    return Plan(
        world_size=4, gpu_memory=None, device="cuda", profile=profile.name,
        profile_origin=profile.origin, layers=choose(sites, world_size=4, profile=profile),
    )  # fmt: skip


def test_the_plan_names_the_kernels_wherever_it_is_looked_at() -> None:
    profile = _profile(FLASH, CUDNN, EFFICIENT, MATH)
    plan = _plan(profile, causal_site(0), _windowed(name="model.layers.1.self_attn"))
    for told in (" ".join(str(plan).split()), to_html(plan)):
        assert "bfloat16; cuda_cudnn kernel" in told
        assert "bfloat16; kernels: cuda_cudnn (masked: cuda_efficient)" in told
    assert "cuda_cudnn (masked: cuda_efficient)" in strategy_options_text(plan, "*.1.*", profile)
    assert Plan.from_json(plan.to_json()) == plan
    other = _plan(_profile(FLASH, EFFICIENT, MATH), causal_site(0))
    assert "cuda_cudnn -> cuda_flash, " in diff_text(plan, other)


def test_a_plan_that_was_saved_before_reads_and_says_one_kernel() -> None:
    plan = _plan(_profile(FLASH, MATH), causal_site())
    text = plan.to_json()
    assert '"kernel": "cuda_flash"' in text
    choice = KernelChoice.of(Plan.from_json(text).layers[0].kernel)
    assert choice == KernelChoice(forward=Pick("cuda_flash"), backward=Pick("cuda_flash"))


@pytest.mark.parametrize("text", ["", "cuda_flash backward", "a b", "a forward, ", "a (masked: )"])
def test_what_names_no_kernels_is_refused(text: str) -> None:
    with pytest.raises(RingfxError, match="names no kernels"):
        KernelChoice.of(text)


def test_a_profile_keeps_its_cards_capability() -> None:
    profile = _profile(FLASH, MATH, capability="9.0")
    assert read_profile(profile_json(profile), "made up") == profile
    assert shipped("cpu-default").capability == ""
