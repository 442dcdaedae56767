"""The published table of one GTX 1080 as a profile: what it says, and what it must not claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import resources
from typing import Any

import pytest

from ringfx.cost_model import choose, load_profile
from ringfx.cost_model.calibration.from_records import fit_kernels, fit_memory, observed_profile
from ringfx.cost_model.calibration.records import AttentionRecord, read_records
from ringfx.cost_model.prediction.profile import profile_json, read_profile
from ringfx.errors import OutOfMemory, ProfileError
from ringfx.ir.values import AttentionSite
from ringfx.strategies import STRATEGIES
from tests.cost_model.sites import full_site, predicted, shipped

SEED = shipped("gtx-1080-seed")
TEXT = (resources.files("ringfx.cost_model") / "records" / "gtx-1080-seed.jsonl").read_text()
RECORDS = tuple(r for r in read_records(TEXT, "seed.jsonl") if isinstance(r, AttentionRecord))
CARD = round(7.88 * 2**30)
TABLE = {name: STRATEGIES[name] for name in ("simple", "collective", "production")}
MEASURED = [r for r in RECORDS if r.peak_bytes is not None and not r.suspect_peak]


def _site(tokens: int, density: float = 1.0) -> AttentionSite:
    sizes = {"heads": 8, "kv_heads": 8, "head_dim": 64, "v_head_dim": 64}
    return full_site(tokens=tokens, density=density, dtype="float16", trains=False, **sizes)


def _dilated(tokens: int) -> AttentionSite:
    """Segments 1024, 2048, 4096 with every 1st, 2nd, 4th row: 1792 keys a row on average."""
    return _site(tokens, density=(1024 / 1 + 2048 / 4 + 4096 / 16) / tokens)


def _choose(tokens: int, memory: int) -> str:
    (layer,) = choose(
        [_dilated(tokens)], world_size=1, profile=SEED, gpu_memory=memory, strategies=TABLE
    )
    return layer.strategy


def test_the_shipped_profile_is_what_the_records_give() -> None:
    given = observed_profile(RECORDS, name=SEED.name, device=SEED.device, origin=SEED.origin)
    again = read_profile(profile_json(given), "again")
    assert replace(again, memory=(), kernels=()) == replace(SEED, memory=(), kernels=())
    assert _numbers(again.memory) == pytest.approx(_numbers(SEED.memory), rel=FITTED)
    assert _numbers(again.kernels) == pytest.approx(_numbers(SEED.kernels), rel=FITTED)
    assert _words(again.memory + again.kernels) == _words(SEED.memory + SEED.kernels)


FITTED = 1e-3
"""A fit's last of four digits depends on the processor: its sums are taken in another order."""


def _numbers(rows: Sequence[Any]) -> list[float]:
    values = (value for row in rows for value in asdict(row).values())
    return [float(value) for value in values if isinstance(value, (int, float))]


def _words(rows: Sequence[Any]) -> list[str]:
    return [value for row in rows for value in asdict(row).values() if isinstance(value, str)]


@pytest.mark.parametrize("record", MEASURED, ids=lambda r: f"{r.strategy}-{r.q_len}")
def test_the_memory_column_is_reproduced_within_5_percent(record: AttentionRecord) -> None:
    found = predicted(_site(record.q_len, record.density), record.strategy, 1, SEED)
    assert found.workspace_bytes == pytest.approx(record.peak_bytes, rel=0.05)


def test_the_suspect_entry_is_flagged_and_was_not_fitted() -> None:
    assert SEED.notes == (
        "left out: simple at 8192 tokens, 2048 MB contradicts the table's own ratio to Collective,"
        " 38.81 x 53.7 = 2084 MB",
    )
    without = [r for r in RECORDS if not r.suspect_peak]
    assert _numbers(fit_memory(without)[0]) == pytest.approx(_numbers(SEED.memory), rel=FITTED)


def test_the_out_of_memory_of_simple_at_16384_is_predicted() -> None:
    assert predicted(_site(16384), "simple", 1, SEED).workspace_bytes > CARD
    for name in ("collective", "production"):
        assert predicted(_dilated(16384), name, 1, SEED).workspace_bytes < CARD
    with pytest.raises(OutOfMemory, match="no choice of strategies fits: 1 ranks need at least"):
        choose(
            [_site(16384)],
            world_size=1,
            profile=SEED,
            gpu_memory=CARD,
            strategy="simple",
            strategies=TABLE,
        )


def test_without_the_censored_observation_nothing_would_forbid_it() -> None:
    """The fit uses it: raise the capacity that was too little, and more memory is predicted."""
    more = [replace(r, capacity_bytes=2 * CARD) if r.out_of_memory else r for r in RECORDS]
    rows = {row.strategy: row for row in fit_memory(more)[0]}
    shipped_row = next(row for row in SEED.memory if row.strategy == "simple")
    assert rows["simple"].scores > shipped_row.scores


@pytest.mark.parametrize("tokens", [4096, 8192, 16384])
def test_the_choices_follow_the_tables_recommendations(tokens: int) -> None:
    """Fastest that fits; Collective when memory is short; Simple never where another fits."""
    assert _choose(tokens, CARD) == "production"
    short = predicted(_dilated(tokens), "production", 1, SEED).workspace_bytes - 1
    assert _choose(tokens, short) == "collective"
    for memory in (CARD, short, CARD // 100):
        try:
            assert _choose(tokens, memory) != "simple"
        except OutOfMemory:
            smallest = predicted(_dilated(tokens), "collective", 1, SEED).workspace_bytes
            assert memory < smallest


def test_no_rank_is_claimed_inside_the_noise() -> None:
    assert SEED.noise == 3.0
    (layer,) = choose([_dilated(8192)], world_size=1, profile=SEED, strategies=TABLE)
    assert layer.reason.endswith("slower, a tie within the noise")


def test_its_error_is_reported_beside_its_noise() -> None:
    assert "% left out; memory: median error 0." in SEED.quality
    assert "% left out" in load_profile("gtx-1080-seed", device="cuda").origin
    assert fit_kernels(RECORDS)[1].num_records == 8


def test_it_is_kept_apart_from_every_local_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ringfx.cost_model.prediction.devices.device_name", lambda device: "NVIDIA GeForce GTX 1080"
    )
    assert load_profile(None, device="cuda").name != "gtx-1080-seed"
    notes = load_profile("gtx-1080-seed", device="cuda").notes
    assert notes[-1] == (
        "profile gtx-1080-seed was measured on other code than ringfx: it predicts the cost of that"
        " code"
    )


def test_it_claims_nothing_about_messages_and_training() -> None:
    message = (
        "profile 'gtx-1080-seed' was observed forward on one rank: it has no figures for backward"
        " or communication. Do: plan with another profile, such as one from `ringfx calibrate`."
    )
    for site, world_size in ((_site(4096), 2), (replace(_site(4096), trains=True), 1)):
        with pytest.raises(ProfileError) as caught:
            predicted(site, "production", world_size, SEED)
        assert str(caught.value) == message
    with pytest.raises(ProfileError, match="has no memory row for 'ulysses'"):
        predicted(_site(4096), "ulysses", 1, SEED)
