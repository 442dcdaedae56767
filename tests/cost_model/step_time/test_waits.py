"""What messages wait within a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

import ringfx
from ringfx.cost_model.calibration.measure_waits import StepWithMessages, fit_wait_us
from ringfx.cost_model.choice.whatif import Change, replan
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.prediction.terms import message_seconds
from ringfx.ir.plan import Plan
from ringfx.ir.step_time import WAITS
from tests.cost_model.sites import shipped
from tests.end_to_end.models import plain, tokens


@pytest.fixture
def profile() -> Profile:
    return replace(shipped("cpu-default"), message_wait_us=1000.0)


@pytest.fixture
def plan(profile: Profile) -> Plan:
    return ringfx.plan(plain()(), (tokens(64),), world_size=2, profile=profile)


def test_every_message_of_a_step_waits_once(plan: Plan) -> None:
    assert plan.step is not None
    split = [layer for layer in plan.layers if layer.communication_ms]
    assert split
    of_calls_and_attention = 1 + 2 * len(split)
    assert plan.step.of(WAITS) == pytest.approx(of_calls_and_attention + len(plan.collectives))


def test_one_rank_waits_for_nobody(plan: Plan, profile: Profile) -> None:
    alone = replan(plan, Change(world_size=1), profile)
    assert alone.step is not None
    assert alone.step.of(WAITS) == 0
    again = replan(plan, Change(), profile)
    assert again.step is not None
    assert plan.step is not None
    assert again.step.of(WAITS) == pytest.approx(plan.step.of(WAITS))


def test_a_wait_is_what_a_step_takes_beyond_its_messages(profile: Profile) -> None:
    sizes = [("send_recv", 2**20)] * 6, [("all_reduce", 2**22)] * 8
    ways = [tuple(sizes[0]), tuple(sizes[0] + sizes[1])]
    own_ms = [
        1e3 * sum(message_seconds(profile, what, 2, size) for what, size in way) for way in ways
    ]
    steps = [
        StepWithMessages(more_ms=ms + 3.0 * len(way), messages=way)
        for ms, way in zip(own_ms, ways, strict=True)
    ]
    assert fit_wait_us(steps, 2, profile) == pytest.approx(3000, abs=0.1)
    none = [replace(step, more_ms=0.0) for step in steps]
    assert fit_wait_us(none, 2, profile) == 0
