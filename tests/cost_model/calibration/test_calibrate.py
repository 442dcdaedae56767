from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ringfx.cli.main import app
from ringfx.cost_model import load_profile
from ringfx.cost_model.calibration.bench import Sample, admitted
from ringfx.cost_model.calibration.calibrate import Measurements, calibrate, make_profile
from ringfx.cost_model.calibration.from_records import fit_kernels, fit_links
from ringfx.cost_model.calibration.layers import fit_layers, layer_records, layer_sites
from ringfx.cost_model.calibration.measure import Effort, kernel_cases, spread
from ringfx.cost_model.calibration.measure_step import LAYERS, step_times
from ringfx.cost_model.calibration.records import AttentionRecord, MessageRecord, read_records
from ringfx.cost_model.prediction.profile import own_profiles, profile_json, read_profile
from ringfx.cost_model.prediction.profile_rows import Direction, KernelRow
from ringfx.errors import CommunicationError, ProfileError
from tests.cost_model.sites import causal_site, predicted, shipped

HARDLY = Effort(
    seconds_per_case=0.0, min_repeats=2, max_tokens=256, max_message_bytes=2**14,
    operator_tokens=256, compiled=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def measured(steps: list[tuple[str, int, int]]) -> Measurements:
    """Two gloo ranks, hardly any repetition: what is tested is the way, not the numbers."""
    found = calibrate("cpu", num_ranks=2, effort=HARDLY, progress=lambda *step: steps.append(step))
    assert found is not None
    return found


@pytest.mark.ranks
def test_a_calibration_measures_everything_a_prediction_needs(measured: Measurements) -> None:
    profile = make_profile(measured)
    assert profile.kind == "measured"
    assert {row.operation for row in profile.links} == {
        "send_recv", "all_gather", "reduce_scatter", "all_to_all", "all_reduce",
    }  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        for strategy in ("simple", "collective", "production", "ulysses"):
            site = causal_site(dtype=dtype, device="cpu")
            assert predicted(site, strategy, 2, profile).total_ms > 0
    assert profile.memory_gbytes_per_s is not None
    assert profile.memory_gbytes_per_s > 0
    # Differences of two measured times: on a noisy machine they may come out as nothing.
    assert profile.mask_ns_per_pair >= 0
    assert profile.contention_ns_per_byte >= 0
    assert profile.message_wait_us >= 0
    sent = [[what for what, _ in step.messages] for step in measured.sending]
    assert [what.count("send_recv") for what in sent] == [2 * LAYERS, 2 * LAYERS]
    assert sent[1].count("all_reduce") > LAYERS
    assert profile.noise >= 1


@pytest.mark.ranks
@pytest.mark.inductor
def test_steps_are_timed_as_inductor_compiles_them_too(measured: Measurements) -> None:
    found = step_times("cpu", replace(HARDLY, compiled=True, operator_tokens=32))
    assert found.fused_ms is not None
    compiled = replace(
        measured, steps=replace(found, fused_ms=tuple(9 * x for x in found.eager_ms))
    )
    factors = make_profile(compiled).step_factor, make_profile(compiled).fused_step_factor
    assert 2 * factors[0] < factors[1], "not the factor of eager steps"


@pytest.mark.ranks
def test_a_calibrated_profile_says_what_it_was_made_on_and_how_well_it_fits(
    measured: Measurements,
) -> None:
    profile = make_profile(measured, "mine")
    assert read_profile(profile_json(profile), "mine") == profile
    assert profile.origin.startswith(f"measured {measured.date} on {measured.device_name} with 2")
    assert "kernel times: median error" in profile.quality
    assert "messages: median error" in profile.quality
    assert all("median error" in row.origin for row in profile.kernels)


@pytest.mark.ranks
def test_progress_counts_every_step_once(
    measured: Measurements, steps: list[tuple[str, int, int]]
) -> None:
    assert [done for _, done, _ in steps] == list(range(len(steps)))
    assert {total for _, _, total in steps} == {len(steps)}
    assert len(steps) > len(kernel_cases("cpu", HARDLY))


@pytest.mark.ranks
def test_the_command_writes_a_profile_that_plans_find_by_device(
    measured: Measurements, profiles_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ringfx.cli.calibrate.calibrate", lambda *args, **options: measured)
    records = tmp_path / "all.jsonl"
    result = CliRunner().invoke(app, ["calibrate", "--name", "mine", "--records", str(records)])
    assert result.exit_code == 0, result.output
    path = profiles_folder / "mine.json"
    assert f"written to {path}" in result.stdout
    assert "GFLOP/s" in result.stdout
    found = load_profile(None, device="cpu")
    assert (found.name, found.notes) == ("mine", ())
    assert found.quality in found.origin
    assert len(read_records(records)) == len(
        (*measured.kernels, *measured.messages, *measured.layers)
    )


@pytest.mark.ranks
def test_a_rank_that_fails_is_an_error_with_its_traceback() -> None:
    with pytest.raises(
        CommunicationError, match=r"measurement: rank 0 of 1: Traceback(.|\n)*Error: "
    ):
        calibrate(
            "cpu",
            num_ranks=1,
            effort=replace(HARDLY, max_tokens="many"),  # type: ignore[arg-type]
            progress=lambda *step: None,
        )


def test_an_unknown_device_is_refused() -> None:
    result = CliRunner().invoke(app, ["calibrate", "--device", "abacus"])
    assert result.exit_code == 2
    assert result.stderr.strip() == (
        "ringfx: unknown device 'abacus'. Do: give --device cpu or --device cuda."
    )


@pytest.mark.parametrize(
    "content", [b'{"schema": 7}', b"\xff\xfe{", b"", b"[" * 10**5, b"\x1f\x8b1"]
)
def test_a_damaged_own_profile_is_left_out_with_one_warning_that_names_it(
    profiles_folder: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    profiles_folder.mkdir()
    (profiles_folder / "bad.json").write_bytes(content)
    (profiles_folder / "good.json").write_text(profile_json(shipped("cpu-default")))
    for _ in range(2):
        assert [profile.name for profile in own_profiles()] == ["cpu-default"]
    assert load_profile(None, device="cpu").device == "cpu"
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert "bad.json" in said[0]
    with pytest.raises(ProfileError, match=r"bad\.json"):
        load_profile("bad", device="cpu")


@pytest.mark.parametrize("option", ["--out", "--records"])
def test_calibrate_looks_whether_it_can_write_before_it_measures(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfx.cli.calibrate._measured", lambda *args: pytest.fail("measured"))
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "below.json", tmp_path):
        result = CliRunner().invoke(app, ["calibrate", option, str(path)])
        assert result.exit_code == 2
        assert f"{path} cannot be written: " in result.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_the_spread_is_half_the_interquartile_range() -> None:
    assert spread([1.0, 2.0]) == 0
    assert spread([1.0, 1.0, 1.0, 1.0]) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(0.5)


def test_the_shipped_measurements_are_what_their_records_give() -> None:
    text = (resources.files("ringfx.cost_model") / "records" / "amd-epyc-2-ranks.jsonl").read_text()
    records = read_records(text, "amd-epyc-2-ranks.jsonl")
    kernels, _ = fit_kernels([r for r in records if isinstance(r, AttentionRecord)])
    messages = [r for r in records if isinstance(r, MessageRecord)]
    links, _ = fit_links(messages, {"loopback": "node"})
    profile = shipped("amd-epyc-2-ranks")
    for found, kept in zip((*kernels, *links), (*profile.kernels, *profile.links), strict=True):
        rate = "gflops" if isinstance(found, KernelRow) else "gbytes_per_s"
        assert getattr(found, rate) == pytest.approx(getattr(kept, rate), rel=0.02)
    layers = [r for r in records if isinstance(r, AttentionRecord) and not r.kernel]
    bare = replace(profile, overheads=(), handling_ns_per_byte=0.0, merge_us=0.0)
    again, _ = fit_layers(layers, bare)
    for name in ("handling_ns_per_byte", "merge_us"):
        assert getattr(again, name) == pytest.approx(getattr(profile, name), rel=0.02, abs=1e-3)


def test_what_surrounds_calls_is_found_again_in_layers_that_it_made() -> None:
    costs: dict[str, Any] = {"handling_ns_per_byte": 0.3, "merge_us": 120.0}
    bare = replace(shipped("amd-epyc-2-ranks"), overheads=(), **dict.fromkeys(costs, 0.0))
    truth = replace(bare, **costs)
    records = []
    for site in layer_sites(2, "cpu", 4096):
        for strategy in admitted(site, 2):
            made = predicted(site, strategy, 2, truth)
            samples: dict[Direction, Sample] = {
                "forward": Sample(median_ms=made.forward_ms, spread=0.0, again=0.0),
                "backward": Sample(median_ms=made.backward_ms, spread=0.0, again=0.0),
            }
            records += layer_records(site, strategy, samples, 2, "loopback")
    found, quality = fit_layers(records, bare)
    assert {name: getattr(found, name) for name in costs} == pytest.approx(costs, rel=0.05)
    assert quality.median_error < 0.01


@pytest.mark.slow
@pytest.mark.ranks
def test_under_torchrun_its_ranks_measure_and_the_first_one_writes(tmp_path: Path) -> None:
    profile, records = tmp_path / "profile.json", tmp_path / "records.jsonl"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    launcher += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    words = ["calibrate", "--quick", "--out", str(profile), "--records", str(records)]
    command = [
        sys.executable,
        *launcher,
        "-m",
        "tests.cost_model.calibration.hardly_calibrated",
        *words,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("written to") == 1
    found = read_profile(profile.read_text(), "profile.json")
    assert "with 2 ranks at once over loopback" in found.origin
    assert found.ranks_per_node == 2
    assert {row.operation for row in found.links} >= {"send_recv", "all_to_all"}
    assert {r.world_size for r in read_records(records) if isinstance(r, MessageRecord)} == {2}
