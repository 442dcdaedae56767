from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ringfx.cli.main import app
from ringfx.cost_model.choice.whatif import Change, parse_sweep, replan, sweep
from ringfx.errors import InvalidArgument
from ringfx.ir.memory_plan import MemoryPart, MemoryPlan
from ringfx.ir.plan import Plan
from ringfx.ir.values import Declined
from ringfx.report.plan_views import diff_text, strategy_options_text, sweep_text
from tests.report.pages import H100, attention_plan


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(attention_plan().to_json())
    return path


def _run(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words])


# --- one layer ----------------------------------------------------------------------------------


def test_explain_gives_every_strategy_its_numbers_or_its_refusal() -> None:
    text = strategy_options_text(attention_plan(), "model.layers.3.*", H100)
    lines = text.split("\n")
    assert lines[0] == "model.layers.3.self_attn: causal, 65,536 tokens, 12 ranks"
    assert [line.split()[0] for line in lines[3:5]] != ["*", "*"]
    for strategy in ("production", "collective", "simple"):
        assert any((strategy in line and "GiB" in line) or "MiB" in line for line in lines)
    assert sum(line.strip().startswith("*") for line in lines) == 2, "times, then sizes"
    assert max(map(len, lines)) <= 80
    assert "ulysses cannot run: " in text
    assert "heads % ranks == 0; here 32 heads, 12 ranks" in " ".join(text.split())
    assert "  chosen: fastest of 3; next " in text


def test_explain_folds_equal_layers_and_shows_all_that_a_glob_names() -> None:
    text = strategy_options_text(attention_plan(), "*", H100)
    assert "model.layers.{0,2,4}.self_attn: none" in text
    assert "model.layers.{1,3,5}.self_attn: causal" in text


def test_explain_of_no_layer_lists_the_layers() -> None:
    with pytest.raises(
        InvalidArgument, match=r"no attention named 'decoder.*Do: name one of its 6: model\."
    ):
        strategy_options_text(attention_plan(), "decoder", H100)


# --- two plans ----------------------------------------------------------------------------------


def test_equal_plans_have_no_difference() -> None:
    assert diff_text(attention_plan(), attention_plan()) == "the plans are equal"


def test_a_difference_names_settings_layers_and_totals() -> None:
    before, after = (
        attention_plan(),
        replan(attention_plan(), Change(world_size=2, gpu_memory=2**40), H100),
    )
    lines = diff_text(before, after).split("\n")
    assert lines[:2] == ["ranks: 12 -> 2", "budget: none -> 1.00 TiB"]
    assert any(line.startswith("model.layers.{1,3,5}.self_attn: ") for line in lines)
    assert lines[-2].startswith("attention a step: ")
    assert "%)" in lines[-2]
    assert lines[-1].startswith("attention's memory: ")


def test_a_difference_shows_a_strategy_that_changes() -> None:
    plan = attention_plan()
    forced = replan(plan, Change(), H100, {"model.layers.0.*": "simple"})
    (line,) = [x for x in diff_text(plan, forced).split("\n") if "layers.0." in x]
    assert f"{plan.layers[0].strategy} -> simple, " in line


def test_layers_of_one_plan_only_are_named() -> None:
    plan = attention_plan()
    shorter = Plan.from_json(json.dumps({**json.loads(plan.to_json()), "layers": []}))
    assert "model.layers.{0,2,4}.self_attn: only in the first plan" in diff_text(plan, shorter)
    assert "model.layers.{0,2,4}.self_attn: only in the second plan" in diff_text(shorter, plan)


# --- many plans ---------------------------------------------------------------------------------


def test_a_sweep_has_a_line_for_each_value() -> None:
    plan = replan(attention_plan(), Change(gpu_memory=2**32), H100)
    name, changes = parse_sweep("seq-len=64k..1M")
    lines = sweep_text(name, changes, sweep(plan, changes, H100)).split("\n")
    assert lines[0].split()[:2] == ["seq-len", "strategies"]
    assert [line.split()[0] for line in lines[1:6]] == [
        "65,536", "131,072", "262,144", "524,288", "1,048,576",
    ]  # fmt: skip
    assert lines[5].split()[1] == "none"
    failed = [line for line in lines if line.startswith("1,048,576: no choice of strategies fits:")]
    assert len(failed) == 1
    assert max(map(len, lines)) <= 80
    bars = [bar for line in lines[1:] if set(bar := line.split()[-1]) <= set("█▏▎▍▌▋▊▉")]
    assert len(bars) == 3
    assert bars == sorted(bars, key=len)
    assert bars[-1] == "█" * 24


def test_a_sweep_of_lengths_under_a_budget_ends_with_the_longest_that_fits(saved: Path) -> None:
    words = ["--sweep", "seq-len=64k..256k", "--gpu-memory", "4GiB"]
    result = _run(str(saved), *words)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("longest sequence that fits: ")


def test_blocks_of_the_model_are_folded_largest_first() -> None:
    blocks = [(f"model.layers.{i}", 2**20) for i in range(8)] + [("lm_head", 2**22)]
    memory = MemoryPlan(
        parts=(MemoryPart(cause="temporaries", bytes=12 * 2**20, kind="split"),),
        by_block=tuple(blocks),
    )
    text = str(dataclasses.replace(attention_plan(), memory=memory))
    lines = text[text.index("by block of the model") :].split("\n")
    assert [line.strip() for line in lines[1:3]] == [
        "8.00 MiB  model.layers.{0..7}, 1.00 MiB each",
        "4.00 MiB  lm_head",
    ]


# --- through the command -----------------------------------------------------------------------


def test_a_saved_plan_is_shown_again(saved: Path) -> None:
    result = _run(str(saved))
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(attention_plan())


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--explain", "*.0.*"], "model.layers.0.self_attn: none, 65,536 tokens, 12 ranks"),
        (["--what-if", "world-size=4"], "ringfx plan for 4 ranks on cuda"),
        (["--sweep", "world-size=2,4"], "world-size  strategies"),
        (["--max-seq-len", "--gpu-memory", "8GiB"], "longest sequence that fits: "),
    ],
)
def test_views_of_a_saved_plan(saved: Path, words: list[str], start: str) -> None:
    result = _run(str(saved), *words)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(start)


def test_a_saved_plan_is_chosen_again_under_another_word_or_profile(saved: Path) -> None:
    by_word = Plan.from_json(_run(str(saved), "--strategy", "simple", "--json").stdout)
    assert {layer.strategy for layer in by_word.layers} == {"simple"}
    elsewhere = Plan.from_json(_run(str(saved), "--profile", "a100-sxm-published", "--json").stdout)
    assert elsewhere.profile == "a100-sxm-published"
    assert any(note.text.startswith("profile a100-sxm-published ") for note in elsewhere.notes)
    assert elsewhere.total_ms > attention_plan().total_ms


def test_regions_of_equal_layers_are_one_line() -> None:
    near = tuple(
        Declined(node="", name=f"layers.{i}.mix", source="a/model.py:3", reason="its heads mix")
        for i in range(4)
    )
    text = str(dataclasses.replace(attention_plan(), declined=near))
    assert "4 x layers.{0..3}.mix (a/model.py:3): its heads mix" in text


def test_strict_also_holds_for_a_saved_plan(tmp_path: Path) -> None:
    overlooked = Declined(node="q", name="q", source="model.py:3", reason="softmax")
    path = tmp_path / "missed.json"
    path.write_text(dataclasses.replace(attention_plan(), missed=(overlooked,)).to_json())
    assert _run(str(path)).exit_code == 0
    result = _run(str(path), "--strict")
    assert result.exit_code == 2
    assert "1 of the program's attentions were not recognised" in result.stderr


def test_what_if_shows_the_changed_plan_and_the_difference(saved: Path) -> None:
    text = _run(str(saved), "--what-if", "world-size=4").stdout
    assert "ranks: 12 -> 4" in text
    changed = Plan.from_json(_run(str(saved), "--what-if", "world-size=4", "--json").stdout)
    assert changed.world_size == 4


def test_diff_compares_with_a_saved_plan(saved: Path) -> None:
    assert _run(str(saved), "--diff", str(saved)).stdout == "the plans are equal\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--diff", "absent.json"], "ringfx: absent.json cannot be read: No such file"),
        (["--max-seq-len"], "needs a budget. Do: plan with one, such as --gpu-memory 80GiB."),
        (["--explain", "decoder"], "ringfx: the plan has no attention named 'decoder'."),
        (["--seq-len", "8k"], "is a saved plan: its length and number of ranks are fixed."),
        (
            ["--infer", "--dtype", "float16"],
            "is a saved plan, which --infer, --dtype cannot change",
        ),
        (["--optimizer", "adamw"], "which --optimizer cannot change. Do: remove it, or plan"),
        (["--strategy", "nonsense"], "ringfx: unknown strategy 'nonsense'."),
        (["--profile", "absent"], "ringfx: there is no profile 'absent'."),
        (["--gpu-memory", "1MiB"], "ringfx: no choice of strategies fits: 12 ranks need"),
    ],
)
def test_mistakes_give_one_text_and_exit_code_2(
    saved: Path, words: list[str], message: str
) -> None:
    result = _run(str(saved), *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_model_needs_its_length_and_ranks() -> None:
    result = _run("models:make")
    assert result.exit_code == 2
    assert result.stderr.strip() == (
        "ringfx: planning models:make needs a number of ranks; only a saved plan has its own. Do: "
        "give --world-size 8, say, and --seq-len unless the model has inputs of its own."
    )
