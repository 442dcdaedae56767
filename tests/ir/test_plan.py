from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from ringfx.errors import InvalidArgument
from ringfx.ir.folding import fold
from ringfx.ir.memory_plan import MemoryPart, MemoryPlan
from ringfx.ir.note import Note, NoteKind
from ringfx.ir.plan import SCHEMA_VERSION, LayerPlan, Plan, joined
from ringfx.ir.step_time import StepPart, StepTime
from ringfx.ir.values import Collective, CommKind, Declined, TokenAxis
from ringfx.report.plan_html import to_html
from ringfx.units.format import format_bytes, index_set
from tests.cost_model.sites import causal_site


def _layer(index: int = 0, **changes: Any) -> LayerPlan:
    fields: dict[str, Any] = {
        "site": causal_site(index),
        "strategy": "production",
        "gloss": "overlapped ring",
        "reason": "fastest of 4; next ulysses, 12% slower",
        "kernel": "flash",
        "forward_ms": 4.0,
        "backward_ms": 10.0,
        "compute_ms": 12.0,
        "communication_ms": 3.0,
        "exposed_ms": 2.0,
        "saved_bytes": 10 * 2**20,
        "workspace_bytes": 3 * 2**20,
    }
    return LayerPlan(**{**fields, **changes})


def _plan(*layers: LayerPlan, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "world_size": 8,
        "gpu_memory": 80 * 2**30,
        "device": "cuda",
        "profile": "h100-sxm-published",
        "profile_origin": "published figures",
        "layers": layers or tuple(_layer(i) for i in range(4)),
        "declined": (
            Declined(node="d", name="pool", source="model.py:3", reason="a learned query"),
        ),
        "axes": (TokenAxis(axis="s0", length=8192, layout="zigzag", local_length=1024),),
        "collectives": (
            Collective(
                node="r",
                name="lm_head",
                source="model.py:9",
                kind=CommKind.ALL_REDUCE,
                bytes_moved=4096,
                reason="a parameter's gradient",
            ),
            Collective(
                node="g",
                name="router",
                source="moe.py:4",
                kind=CommKind.ALL_GATHER,
                bytes_moved=2**20,
                reason="sort orders all tokens",
            ),
        ),
        "memory": MemoryPlan(
            parts=(
                MemoryPart(cause="parameters", bytes=2**34, kind="whole"),
                MemoryPart(cause="logits", bytes=2**30, kind="split", detail="split"),
            ),
            unknown=("optimizer state",),
        ),
        "notes": (Note(text="the profile is published, not measured", kind=NoteKind.PROFILE),),
    }
    return Plan(**{**fields, **changes})


# --- JSON ---------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_json_as_the_same_value() -> None:
    plan = _plan()
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).layers[0].site.spec.is_causal


def test_notes_of_plans_that_were_saved_as_texts_are_read() -> None:
    fields = json.loads(_plan().to_json())
    assert fields["notes"] == [
        {"text": "the profile is published, not measured", "kind": "profile"}
    ]
    fields["notes"] = ["graph break at model.py:3", *fields["notes"]]
    read = Plan.from_json(json.dumps(fields))
    assert read.notes == (Note(text="graph break at model.py:3"), *_plan().notes)
    fields["notes"] = [{"text": "x", "kind": "rumour"}]
    with pytest.raises(InvalidArgument, match=r"notes\[0\]\.kind must be .*'rumour'"):
        Plan.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    ("old", "kind"),
    [
        ("gather", CommKind.ALL_GATHER),
        ("gather_gradient", CommKind.ALL_GATHER_GRADIENT),
        ("exchange", CommKind.ALL_TO_ALL),
        ("borders", CommKind.HALO_EXCHANGE),
        ("all_reduce", CommKind.ALL_REDUCE),
    ],
)
def test_kinds_of_communication_are_read_by_the_names_of_older_plans(
    old: str, kind: CommKind
) -> None:
    text = _plan().to_json().replace('"kind": "all_gather"', f'"kind": "{old}"')
    (move,) = [m for m in Plan.from_json(text).collectives if m.name == "router"]
    assert move.kind is kind


def test_an_unknown_kind_of_communication_is_refused() -> None:
    text = _plan().to_json().replace('"kind": "all_gather"', '"kind": "shout"')
    with pytest.raises(InvalidArgument, match=r"kind must be 'all_gather', .*got 'shout'"):
        Plan.from_json(text)


def test_another_schema_version_is_refused() -> None:
    text = json.dumps({**json.loads(_plan().to_json()), "schema": 99})
    with pytest.raises(InvalidArgument) as caught:
        Plan.from_json(text)
    assert str(caught.value) == (
        f"this plan has schema version 99; this ringfx reads version {SCHEMA_VERSION}."
        " Do: make the plan again with this version of ringfx."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "this is not a plan: line 1 is not JSON (Expecting value)."),
        ("[1]", 'this is not a plan: the text has no "schema" field.'),
        (
            f'{{"schema": {SCHEMA_VERSION}}}',
            "this plan is damaged: field 'world_size' is missing; known are world_size, gpu",
        ),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Plan.from_json(text)
    assert str(caught.value).startswith(message)


# --- digest -----------------------------------------------------------------------------------


def test_the_digest_ignores_what_may_differ_between_machines() -> None:
    plan = _plan()
    slower = tuple(dataclasses.replace(x, forward_ms=9.0, reason="other") for x in plan.layers)
    elsewhere = tuple(
        dataclasses.replace(x, site=dataclasses.replace(x.site, source="/home/b/model.py:1"))
        for x in slower
    )
    other = dataclasses.replace(
        plan, layers=elsewhere, profile="b", notes=(), memory=MemoryPlan(), gpu_memory=None
    )
    assert other.digest() == plan.digest()
    assert other != plan


@pytest.mark.parametrize(
    "change",
    [
        {"world_size": 4},
        {"layers": (_layer(0),)},
        {"layers": tuple(_layer(i, strategy="collective") for i in range(4))},
        {"layers": tuple(_layer(i, site=causal_site(i, 4096)) for i in range(4))},
        {"axes": ()},
        {"axes": (TokenAxis(axis="s0", length=8192, layout="contiguous", local_length=1024),)},
        {"collectives": ()},
    ],
)
def test_the_digest_sees_all_that_changes_a_message(change: dict[str, Any]) -> None:
    assert _plan(**change).digest() != _plan().digest()


# --- text ---------------------------------------------------------------------------------------


def test_the_table_folds_equal_layers_and_shows_what_a_person_needs() -> None:
    text = str(_plan())
    lines = text.split("\n")
    name = lines.index("model.layers.{0..3}.self_attn")
    assert " ".join(lines[name - 2].split()) == "attention compute comm exposed total saved"
    assert " ".join(lines[name + 1].split()) == (
        "4 x production 12.0 ms 3.00 ms 2.00 ms 14.0 ms 10.0 MiB"
    )
    for words in (
        "ringfx plan for 8 ranks on cuda, forward and backward",
        "8,192 tokens (s0): 1,024 on each rank, zigzag",
        "profile h100-sxm-published, of unknown age: published figures",
        "causal; 8,192 tokens, 32/8 heads of 128, bfloat16; flash kernel",
        "found as sdpa at llama/modeling_llama.py:254",
        "production (overlapped ring): fastest of 4; next ulysses, 12% slower",
        "4 attention calls: 56.0 ms a step on each rank (48.0 ms compute, 8.00 ms exposed",
        "40.0 MiB saved for backward, up to 3.00 MiB of workspace",
        "gather, 1.00 MiB at router (moe.py:4): sort orders all tokens",
        "all_reduce, 4.00 KiB at lm_head (model.py:9): a parameter's gradient",
        "pool (model.py:3): a learned query",
        "memory of one rank: 17.0 GiB at the peak, 21% of 80.0 GiB",
        "16.0 GiB   94%  parameters",
        "not counted: optimizer state",
        "the profile is published, not measured",
    ):
        assert words in " ".join(text.split()) or words in text, words


def test_gathers_come_before_other_moves() -> None:
    text = str(_plan())
    assert text.index("gather, 1.00 MiB") < text.index("all_reduce, 4.00 KiB")


def test_text_is_plain_and_fits_a_terminal() -> None:
    path = "/".join(["a_long_folder"] * 12) + "/model.py:3"
    near = Declined(node="d", name="deep." * 30 + "pool", source=path, reason="why " * 40)
    lines = str(_plan(declined=(near,), missed=(near,), notes=(Note(text=path),))).split("\n")
    assert max(map(len, lines)) <= 80
    assert not any("\x1b" in line for line in lines)


@pytest.mark.parametrize(
    ("peak", "words"),
    [
        (70, "fits 80.0 GiB: 70.0 GiB"),
        (79, "fits 80.0 GiB narrowly, predictions may miss by 3%: 79.0 GiB"),
        (81, "DOES NOT FIT 80.0 GiB: 81.0 GiB"),
    ],
)
def test_a_plan_says_whether_it_fits_and_whether_that_is_sure(peak: int, words: str) -> None:
    parts = (MemoryPart(cause="parameters", bytes=peak * 2**30, kind="whole"),)
    found = " ".join(str(_plan(memory=MemoryPlan(parts=parts))).split())
    assert words in found


def test_the_first_screen_says_whether_it_fits_how_long_a_step_takes_and_why() -> None:
    layers = [_layer(i, strategy="production" if i % 3 else "ulysses") for i in range(32)]
    causes = ("parameters", "optimizer state", "logits", "temporaries", "gradient buckets")
    parts = tuple(
        MemoryPart(cause=cause, bytes=(9 - i) * 2**30, kind="split")
        for i, cause in enumerate(causes)
    )
    names = ("products", "reads", "other operators", "optimizer", "norms")
    step = StepTime(
        parts=tuple(
            StepPart(cause=n, forward_ms=50.0 - i, backward_ms=0.0, tokens=1, is_split=True)
            for i, n in enumerate(names)
        ),
        tokens=8192,
        peak_gflops=1e6,
    )
    text = str(_plan(*layers, memory=MemoryPlan(parts=parts), step=step, optimizer="adamw"))
    screen = [" ".join(line.split()) for line in text.split("\n")[:24]]
    for words in (
        "fits 80.0 GiB: 35.0 GiB of memory at the peak, with adamw",
        "9.00 GiB 26% ████▏ parameters",
        "11.0 GiB 31% 2 more, listed below",
        "688 ms a step, 11,907 tokens a second, 0% of the device's peak",
        "384 ms 56% ████████▉ attention",
        "attention: 32/32 found; 21 x production, 11 x ulysses",
        "production (overlapped ring): fastest of 4; next ulysses, 12% slower",
    ):
        assert words in screen, "\n".join(screen)
    assert "5.00 GiB 14% gradient buckets" not in screen
    assert "5.00 GiB   14%  gradient buckets" in text


def test_programs_that_fit_alone_and_not_together_are_said_not_to_fit() -> None:
    def program(index: int) -> Plan:
        parts = (MemoryPart(cause="parameters", bytes=50 * 2**30, kind="whole"),)
        ms = StepPart(
            cause="matrix products", forward_ms=10.0, backward_ms=30.0, tokens=1, is_split=True
        )
        step = StepTime(parts=(ms,), tokens=8192, attention_gflops=1e3, peak_gflops=1e6)
        return _plan(_layer(index), memory=MemoryPlan(parts=parts), step=step)

    whole = joined([program(0), program(1)])
    assert whole.step_ms == 2 * 40.0 + 2 * 14.0
    assert "\n  DOES NOT FIT 80.0 GiB: 100 GiB of memory at the peak" in str(whole)
    assert "75,852 tokens a second" in str(whole)
    page = " ".join(to_html(whole).split())
    assert '<span class="verdict bad">Does not fit</span>' in page
    assert joined([program(0), dataclasses.replace(program(1), step=None)]).step is None


def test_messages_of_equal_layers_are_one_line() -> None:
    def of(name: str, size: int, more: str = "") -> Collective:
        return Collective(
            node=name, name=name, source="", kind=CommKind.ALL_REDUCE, bytes_moved=size,
            reason=f"completes its gradient{more}", in_backward=True,
        )  # fmt: skip

    weights = [of(f"layers.{i}.{w}.weight", 2**20) for i in range(32) for w in ("q", "k", "mlp.up")]
    weights += [of(f"layers.{i}.norm.weight", 2**10 * (1 + i), ", with 6 more") for i in range(4)]
    gathers = [
        dataclasses.replace(
            of(f"layers.{i}.mix", 2**22), kind=CommKind.ALL_GATHER, in_backward=False,
            source="a/m.py:3", reason=why,
        )
        for i in range(32) for why in ("sorts all tokens", "no axis rule")
    ]  # fmt: skip
    text = str(_plan(collectives=(*weights, of("head.weight", 2**24), *gathers)))
    told = " ".join(text[text.index("outside attention:") : text.index("memory of one")].split())
    assert "outside attention: 165 collectives a step, 368 MiB" in told
    assert (
        "101 x all_reduce in backward, 112 MiB in all at layers.{0..31}, head.weight: completes its"
        " gradient"
    ) in told
    for why in ("sorts all tokens", "no axis rule"):
        assert f"32 x all_gather, 4.00 MiB each at layers.{{0..31}}.mix (a/m.py:3): {why}" in told
    assert text.count("all_reduce") == 1
    assert text.count("all_gather") == 2


def test_a_plan_without_layers_or_budget_still_prints() -> None:
    text = str(_plan(layers=(), declined=(), collectives=(), gpu_memory=None, notes=()))
    assert "no budget given" in text
    assert "outside attention" not in text


def test_layers_that_differ_in_anything_shown_stay_apart() -> None:
    layers = [_layer(0), _layer(1, strategy="simple"), _layer(2), _layer(3, compute_ms=13.0)]
    names = [group.name for group in fold(layers)]
    assert names == [
        "model.layers.{0,2}.self_attn",
        "model.layers.1.self_attn",
        "model.layers.3.self_attn",
    ]


def test_stages_of_blocks_fold_along_the_blocks() -> None:
    def block(stage: int, index: int) -> LayerPlan:
        return _layer(site=causal_site(name=f"stages.{stage}.blocks.{index}.attn"))

    layers = [block(0, 0), block(0, 1), block(1, 0), block(1, 1), block(1, 2)]
    assert [g.name for g in fold(layers)] == [
        "stages.0.blocks.{0,1}.attn",
        "stages.1.blocks.{0..2}.attn",
    ]


def test_calls_of_one_module_fold_under_its_name() -> None:
    (group,) = fold([_layer(0), _layer(0)])
    assert (group.name, len(group.layers)) == ("model.layers.0.self_attn", 2)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([3], "3"),
        ([0, 1], "{0,1}"),
        (list(range(32)), "{0..31}"),
        ([0, 2, 4, 6], "{0,2..6}"),
        ([0, 2, 4], "{0,2,4}"),
        ([0, 1, 2, 5, 6, 7], "{0..2,5..7}"),
        ([0, 1, 3, 7], "{0,1,3,7}"),
        ([5, 11, 17, 23], "{5,11..23}"),
    ],
)
def test_index_sets_are_short_and_exact(indices: list[int], text: str) -> None:
    assert index_set(indices) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1023, "1.00 KiB"), (2**40, "1.00 TiB"), (2**50, "1,024 TiB")],
)
def test_bytes_have_three_digits(count: int, text: str) -> None:
    assert format_bytes(count) == text


# --- looking up -----------------------------------------------------------------------------------


def test_a_layer_is_found_by_its_path() -> None:
    assert _plan().layer("model.layers.2.self_attn").site.node == "attention_2"
    with pytest.raises(InvalidArgument) as caught:
        _plan(*map(_layer, range(10))).layer("model.layers.77")
    assert str(caught.value).startswith(
        "the plan has no attention named 'model.layers.77'. Do: name one of its 10: "
        "model.layers.0.self_attn,"
    )


def test_times_add_up() -> None:
    plan = _plan()
    assert plan.total_ms == 4 * 14.0
    for layer in plan.layers:
        assert layer.forward_ms + layer.backward_ms == layer.compute_ms + layer.exposed_ms


def test_a_device_that_torch_does_not_know_is_refused() -> None:
    text = _plan().to_json().replace('"device": "cuda"', '"device": "x"')
    with pytest.raises(InvalidArgument, match=r"device: 'x' is no device type of torch"):
        Plan.from_json(text)
