from __future__ import annotations

import datetime
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from ringfx.cost_model.prediction import devices
from ringfx.cost_model.prediction.profile import available_profiles, load_profile, read_profile
from ringfx.errors import ProfileError
from ringfx.units.age import age_words
from tests.cost_model.sites import shipped


def _fields(name: str = "cpu-default") -> dict[str, Any]:
    text = (resources.files("ringfx.cost_model") / "profiles" / f"{name}.json").read_text()
    fields: dict[str, Any] = json.loads(text)
    return fields


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that this machine's devices have other names."""
    return lambda name: monkeypatch.setattr(devices, "device_name", lambda device: name)


def test_every_shipped_row_has_an_origin_and_a_finite_rate() -> None:
    assert {p.device for p in available_profiles()} >= {"cpu", "cuda"}
    for shipped_profile in available_profiles():
        assert shipped_profile.origin
        assert shipped_profile.memory_origin
        for row in (*shipped_profile.kernels, *shipped_profile.links):
            assert row.origin, row


def test_a_measured_profile_that_ships_tells_its_error_on_layers_it_was_not_fitted_to() -> None:
    measured = [p for p in available_profiles() if p.kind == "measured"]
    assert measured
    for profile in measured:
        assert "held-out sizes: median error " in profile.held_out, (
            "run the report after calibrating"
        )
        assert profile.held_out in load_profile(profile.name, device=profile.device).origin


def test_a_profile_found_for_a_foreign_device_is_announced(on_device: Any) -> None:
    on_device("Quantum 9000")
    notes = load_profile(None, device="cpu").notes
    assert (
        "profile amd-epyc-2-ranks describes AMD EPYC, but this machine has Quantum 9000:"
        " the times are those of the profile's device"
    ) in notes


def test_a_profile_is_announced_where_there_is_no_such_device(on_device: Any) -> None:
    on_device(None)
    notes = load_profile("h100-sxm-published", device="cuda").notes
    assert "describes H100, but this machine has no cuda device:" in notes[0]


def test_a_measured_profile_of_this_device_is_found_before_an_assumed_one(on_device: Any) -> None:
    on_device("AMD EPYC 7763")
    assert load_profile(None, device="cpu").kind == "measured"


def test_assumed_and_published_numbers_are_announced_on_their_own_device(on_device: Any) -> None:
    on_device("AMD EPYC 7763")
    notes = load_profile("cpu-default", device="cpu").notes
    assert notes == (
        "profile cpu-default is assumed, not measured:"
        " `ringfx calibrate` measures the device it runs on",
    )


def test_planning_for_another_device_type_is_announced(on_device: Any) -> None:
    on_device("NVIDIA H100 80GB HBM3")
    notes = load_profile("h100-sxm-published", device="cpu").notes
    assert notes == (
        "the model's tensors are on cpu, but profile h100-sxm-published is for cuda:"
        " the times are those of cuda",
        "profile h100-sxm-published is published, not measured:"
        " `ringfx calibrate` measures the device it runs on",
    )


def test_a_measured_profile_of_this_device_says_nothing(on_device: Any, tmp_path: Path) -> None:
    on_device("AMD EPYC 7763")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**_fields(), "name": "mine", "kind": "measured"}))
    mine = load_profile(path, device="cpu")
    assert (mine.name, mine.notes) == ("mine", ())


def test_the_device_names_itself() -> None:
    assert devices.device_name("cpu")
    assert devices.device_name("abacus") is None


def test_an_unknown_profile_lists_the_shipped_ones() -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile("warp-drive", device="cpu")
    names = ", ".join(sorted(p.name for p in available_profiles()))
    assert str(caught.value) == (
        f"there is no profile 'warp-drive'. Known: {names}."
        " Do: name one of these, or give the path of a file written by `ringfx calibrate`."
    )


def test_a_profile_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.json cannot be read: No such file"):
        load_profile(tmp_path / "none.json", device="cpu")


def test_a_device_type_without_a_profile_lists_those_with() -> None:
    with pytest.raises(ProfileError, match=r"type 'xpu', only for cpu, cuda\. Do: run"):
        load_profile(None, device="xpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "profile mine: line 1 is not JSON"),
        ("[]", "profile mine has schema version None; this ringfx reads version 1"),
        ('{"schema": 9}', "profile mine has schema version 9; this ringfx reads version 1"),
        ('{"schema": 1}', "profile mine is damaged: field 'name' is missing"),
    ],
)
def test_a_file_that_is_no_profile_says_why(text: str, message: str) -> None:
    with pytest.raises(ProfileError) as caught:
        read_profile(text, "mine")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kind": "guessed"},
            "profile mine is damaged: kind must be 'measured', 'published', 'assumed' or"
            " 'observed'; got 'guessed'. Do: write it again with `ringfx calibrate`.",
        ),
        (
            {"memory_gbytes_per_s": 0},
            "profile mine is damaged: memory_gbytes_per_s must be 1e-06 or more; got 0."
            " Do: write it again with `ringfx calibrate`.",
        ),
    ],
)
def test_impossible_fields_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError) as caught:
        read_profile(json.dumps({**_fields(), **change}), "mine")
    assert str(caught.value) == message


def test_a_failed_measurement_cannot_hide_as_a_constant() -> None:
    fields = _fields()
    fields["links"][0]["gbytes_per_s"] = 0
    with pytest.raises(ProfileError, match=r"links\[0\]\.gbytes_per_s must be 1e-06 or"):
        read_profile(json.dumps(fields), "mine")


def test_a_missing_kernel_and_a_missing_link_are_errors_not_guesses() -> None:
    cpu = shipped("cpu-default")
    with pytest.raises(ProfileError, match="'cpu-default' has no row for the 'magic' kernel"):
        cpu.kernel("magic", "float32", "forward")
    alone = read_profile(json.dumps({**_fields(), "links": []}), "mine")
    with pytest.raises(ProfileError) as caught:
        alone.link("send_recv", 4)
    assert str(caught.value) == (
        "profile 'cpu-default' has no row for 'send_recv': it cannot predict 4 ranks."
        " Do: run `ringfx calibrate` with 2 ranks or more, or use a profile that has one."
    )


def test_a_profile_of_one_machine_stands_for_more_ranks() -> None:
    fields = _fields()
    fields["links"] = [row for row in fields["links"] if row["scope"] == "node"]
    one_machine = read_profile(json.dumps({**fields, "ranks_per_node": 2}), "mine")
    assert one_machine.link("send_recv", 128) == one_machine.link("send_recv", 2)


def test_float32_stands_in_for_a_missing_dtype_and_is_announced() -> None:
    cpu = shipped("cpu-default")
    assert cpu.kernel("math", "float64", "forward") == cpu.kernel("math", "float32", "forward")
    assert cpu.missing_rows(["float64", "float32"]) == (
        "profile cpu-default has no float64 kernels: float32 figures are used instead",
    )


def test_published_profiles_say_so_and_give_every_constant_its_source() -> None:
    published = [p for p in available_profiles() if p.kind == "published"]
    assert {p.device_name for p in published} == {"A100", "H100", "H200"}
    for profile in published:
        rows = (*profile.kernels, *profile.links)
        assert not any("measured" in row.origin.split("(")[0].split() for row in profile.kernels)
        assert all(row.origin for row in rows)
        assert {row.scope for row in profile.links} == {"node", "network"}


def test_the_age_of_a_profile_is_told() -> None:
    today = datetime.date.today()
    before = (today - datetime.timedelta(days=40)).isoformat()
    assert age_words(today.isoformat()) == f"of {today.isoformat()}, 0 days old"
    assert age_words(before) == f"of {before}, 40 days old"
    assert age_words("") == "of unknown age"


def test_an_old_measurement_and_one_with_another_torch_are_announced(
    on_device: Any, tmp_path: Path
) -> None:
    on_device("AMD EPYC 7763")
    fields = _fields("amd-epyc-2-ranks")
    path = tmp_path / "old.json"
    path.write_text(json.dumps({**fields, "date": "2020-01-31", "torch": "1.7.1", "notes": []}))
    notes = load_profile(str(path), device="cpu").notes
    assert "was measured with torch 1.7.1, but this is 2." in notes[0]
    assert "is of 2020-01-31, " in notes[1]
    assert notes[1].endswith("`ringfx calibrate` measures again")


def test_a_date_that_is_none_is_refused() -> None:
    text = json.dumps({**_fields(), "date": "yesterday"})
    with pytest.raises(ProfileError, match="date 'yesterday' is not of the form 2026-11-23"):
        read_profile(text, "x.json")
