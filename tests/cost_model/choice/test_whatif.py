from __future__ import annotations

from dataclasses import replace

import pytest

import ringfx
from ringfx.cost_model import choose
from ringfx.cost_model.choice.whatif import (
    NOT_DERIVED,
    Change,
    longest_sequence,
    parse_change,
    parse_sweep,
    replan,
    sweep,
)
from ringfx.errors import InvalidArgument, OutOfMemory
from ringfx.ir.memory_plan import MemoryPlan
from ringfx.ir.memory_timeline import flat, memory_parts, peak
from ringfx.ir.note import NoteKind, texts_of
from ringfx.ir.plan import Plan
from ringfx.ir.values import TokenAxis
from ringfx.units.parse import parse_rate
from tests.cost_model.sites import budget_for, causal_site, shipped
from tests.end_to_end.models import plain, tokens

H100 = shipped("h100-sxm-published")


def _plan(tokens: int = 2**16, gpu_memory: int | None = None, world_size: int = 8) -> Plan:
    sites = [causal_site(i, tokens) for i in range(4)]
    layers = choose(sites, world_size=world_size, profile=H100)
    split = 2**24 * tokens // 2**16 * 8 // world_size
    timeline = flat(sites, whole=2**20, split=split, world_size=world_size)
    found = peak(timeline, layers, world_size=world_size, seq_len=tokens)
    return Plan(
        world_size=world_size,
        gpu_memory=gpu_memory,
        device="cuda",
        profile=H100.name,
        profile_origin=H100.origin,
        layers=layers,
        axes=(
            TokenAxis(
                axis="tokens", length=tokens, layout="zigzag", local_length=tokens // world_size
            ),
        ),
        memory=MemoryPlan(parts=memory_parts(found), timeline=timeline),
    )


def test_no_change_gives_the_same_layers() -> None:
    plan = _plan()
    assert replan(plan, Change(), H100).layers == plan.layers


def test_other_ranks_and_lengths_are_as_if_planned_so() -> None:
    moved = replan(_plan(), Change(world_size=16, seq_len=2**18), H100)
    assert moved.layers == _plan(2**18, world_size=16).layers
    assert moved.axes == _plan(2**18, world_size=16).axes
    assert moved.memory.parts == _plan(2**18, world_size=16).memory.parts
    assert moved.notes == (NOT_DERIVED,)


def test_a_changed_plan_may_be_changed_again() -> None:
    """There and back: the memory outside attention is still known, and so is what fits."""
    plan = _plan(gpu_memory=2**31)
    there = replan(plan, Change(world_size=16, seq_len=2**18), H100)
    outside = 2**20 + 2**24 * 4 // 2
    assert there.memory.peak_bytes == outside + there.saved_bytes + there.workspace_bytes
    back = replan(there, Change(world_size=8, seq_len=2**16), H100)
    assert back.layers == plan.layers
    assert back.memory.parts == plan.memory.parts
    assert back.notes == there.notes
    assert longest_sequence(back, H100) == longest_sequence(plan, H100)


def test_a_plan_with_other_links_says_so() -> None:
    changed = replan(_plan(), Change(link_bytes_per_s=5e10, latency_us=7.0), H100)
    assert texts_of(changed.notes)[:2] == [
        "as if every link had 50 GB/s", "as if every link's latency were 7 us",
    ]  # fmt: skip


def test_a_slower_link_never_makes_a_plan_faster() -> None:
    plan = _plan()
    speeds = (1e12, 1e11, 1e10, 1e9, 1e8)
    times = [replan(plan, Change(link_bytes_per_s=speed), H100).total_ms for speed in speeds]
    assert times == sorted(times)
    assert times[0] < times[-1]
    assert replan(plan, Change(latency_us=1e5), H100).total_ms > plan.total_ms


def test_memory_outside_attention_scales_with_ranks_and_length() -> None:
    """The budget that just holds attention, parameters and the split part at 16 ranks."""
    plan = _plan()
    attention = replan(plan, Change(world_size=16), H100).layers
    needed = sum(x.saved_bytes for x in attention) + max(x.workspace_bytes for x in attention)
    exact = needed + 2**20 + 2**24 // 2
    budget = budget_for(exact)
    assert replan(plan, Change(world_size=16, gpu_memory=budget), H100).layers == attention
    tight = Change(world_size=16, gpu_memory=budget - 1)
    (result,) = sweep(plan, [tight], H100)
    assert isinstance(result, OutOfMemory) or result.layers != attention


def test_the_longest_sequence_fits_and_a_longer_one_does_not() -> None:
    plan = _plan(gpu_memory=2**31)
    longest = longest_sequence(plan, H100)
    assert longest > 2**16
    replan(plan, Change(seq_len=longest), H100)
    with pytest.raises(OutOfMemory):
        replan(plan, Change(seq_len=longest + 2 * plan.world_size), H100)


def test_the_longest_sequence_needs_a_budget() -> None:
    with pytest.raises(InvalidArgument) as caught:
        longest_sequence(_plan(), H100)
    assert str(caught.value) == (
        'the longest sequence needs a budget. Do: plan with one, such as gpu_memory="80GiB".'
    )


def test_a_sweep_reports_what_does_not_fit_beside_what_does() -> None:
    plan = replace(_plan(), gpu_memory=2**31)
    _, changes = parse_sweep("seq-len=64k..4M")
    results = sweep(plan, changes, H100)
    assert isinstance(results[0], Plan)
    refused = results[-1]
    assert isinstance(refused, OutOfMemory)
    # A row of many has room for what is needed; what would fit takes longer to find.
    assert "ranks need at least" in str(refused)
    assert "Do" not in str(refused)
    with pytest.raises(OutOfMemory, match=r"(?s)ranks need at least.*\n  Do"):
        replan(plan, changes[-1], H100)


def test_changes_are_read_from_pairs() -> None:
    assert parse_change("gpu-memory=80GiB, latency-us=5") == Change(
        gpu_memory=80 * 2**30, latency_us=5.0
    )
    _, changes = parse_sweep("world-size=2,3,12")
    assert [change.world_size for change in changes] == [2, 3, 12]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "colour=red",
            "'colour=red' is not a change. Do: give pairs such as world-size=16,link=50GB/s;"
            " names: world-size, seq-len, gpu-memory, link, latency-us.",
        ),
        (
            "world-size",
            "'world-size' is not a change. Do: give pairs such as world-size=16,link=50GB/s;"
            " names: world-size, seq-len, gpu-memory, link, latency-us.",
        ),
        (
            "world-size=none",
            "'none' is not an integer from 1 to 1,073,741,824. Do: give one, such as"
            " world-size=16.",
        ),
        ("link=fast", '\'fast\' is not a speed. Do: give one such as "50GB/s" or "100Mbit/s".'),
    ],
)
def test_what_is_no_change_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_change(text)
    assert str(caught.value) == message


def test_a_sweep_over_nothing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"is an empty range: 1M is above 8k\."):
        parse_sweep("seq-len=1M..8k")
    with pytest.raises(InvalidArgument, match="is not a change"):
        parse_sweep("colour=1..8")


@pytest.mark.parametrize("text", ["50", "GB/s", "0GB/s", "5 parsec/s", "1..2GB/s"])
def test_what_is_no_speed_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a speed"):
        parse_rate(text)


def test_a_budget_above_the_devices_memory_is_said() -> None:
    def said(plan: Plan) -> list[str]:
        return [note.text for note in plan.notes if note.kind is NoteKind.BUDGET]

    plan = ringfx.plan(
        plain()(), (tokens(64),), world_size=2, gpu_memory="200GB", profile="h100-sxm-published"
    )
    profile = shipped("h100-sxm-published")
    assert said(plan) == [
        "the budget is 186 GiB, but a device of profile h100-sxm-published has 74.5 GiB: what is "
        "planned may not fit it"
    ]
    assert not said(replan(plan, Change(gpu_memory=80 * 10**9), profile))
    assert len(said(replan(plan, Change(gpu_memory=10**12), profile))) == 1
    assert (
        len(said(replan(plan, Change(gpu_memory=150 * 10**9), shipped("h200-sxm-published")))) == 1
    )
