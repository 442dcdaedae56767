from __future__ import annotations

import dataclasses
import html
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import ringfx
from ringfx.cli.main import app
from ringfx.cost_model import choose
from ringfx.cost_model.choice.whatif import Change, parse_sweep, replan, sweep
from ringfx.errors import InvalidArgument
from ringfx.ir.memory_plan import MemoryPart, MemoryPlan
from ringfx.ir.note import Note
from ringfx.ir.plan import Plan
from ringfx.ir.values import Declined
from ringfx.report.plan_html import to_html
from ringfx.report.plan_views import diff_text, strategy_options_text, sweep_text
from tests.cost_model.sites import causal_site, full_site, shipped
from tests.end_to_end.models import plain, tokens

H100 = shipped("h100-sxm-published")


def _plan(*, world_size: int = 12) -> Plan:
    sites = [causal_site(i, 2**16) if i % 2 else full_site(i, 2**16) for i in range(6)]
    return Plan(
        world_size=world_size,
        gpu_memory=None,
        device="cuda",
        profile=H100.name,
        profile_origin=H100.origin,
        layers=choose(sites, world_size=world_size, profile=H100),
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(_plan().to_json())
    return path


def _run(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words])


# --- one layer ----------------------------------------------------------------------------------


def test_explain_gives_every_strategy_its_numbers_or_its_refusal() -> None:
    text = strategy_options_text(_plan(), "model.layers.3.*", H100)
    lines = text.split("\n")
    assert lines[0] == "model.layers.3.self_attn: causal, 65,536 tokens, 12 ranks"
    assert [line.split()[0] for line in lines[3:5]] != ["*", "*"]
    for strategy in ("production", "collective", "simple"):
        assert any((strategy in line and "GiB" in line) or "MiB" in line for line in lines)
    assert sum(line.strip().startswith("*") for line in lines) == 1
    assert any(
        line.startswith("  ulysses cannot run here") or "ulysses cannot run: " in line
        for line in lines
    )
    assert "heads % ranks == 0; here 32 heads, 12 ranks" in text
    assert "  chosen: fastest of 3; next " in text


def test_explain_folds_equal_layers_and_shows_all_that_a_glob_names() -> None:
    text = strategy_options_text(_plan(), "*", H100)
    assert "model.layers.{0,2,4}.self_attn: none" in text
    assert "model.layers.{1,3,5}.self_attn: causal" in text


def test_explain_of_no_layer_lists_the_layers() -> None:
    with pytest.raises(InvalidArgument, match=r"no attention named 'decoder.*It has 6: model\."):
        strategy_options_text(_plan(), "decoder", H100)


# --- two plans ----------------------------------------------------------------------------------


def test_equal_plans_have_no_difference() -> None:
    assert diff_text(_plan(), _plan()) == "the plans are equal"


def test_a_difference_names_settings_layers_and_totals() -> None:
    before, after = _plan(), replan(_plan(), Change(world_size=2, gpu_memory=2**40), H100)
    lines = diff_text(before, after).split("\n")
    assert lines[:2] == ["ranks: 12 -> 2", "budget: none -> 1.00 TiB"]
    assert any(line.startswith("model.layers.{1,3,5}.self_attn: ") for line in lines)
    assert lines[-2].startswith("attention a step: ")
    assert "%)" in lines[-2]
    assert lines[-1].startswith("attention's memory: ")


def test_a_difference_shows_a_strategy_that_changes() -> None:
    plan = _plan()
    forced = replan(plan, Change(), H100, {"model.layers.0.*": "simple"})
    (line,) = [x for x in diff_text(plan, forced).split("\n") if "layers.0." in x]
    assert f"{plan.layers[0].strategy} -> simple, " in line


def test_layers_of_one_plan_only_are_named() -> None:
    plan = _plan()
    shorter = Plan.from_json(json.dumps({**json.loads(plan.to_json()), "layers": []}))
    assert "model.layers.{0,2,4}.self_attn: only in the first plan" in diff_text(plan, shorter)
    assert "model.layers.{0,2,4}.self_attn: only in the second plan" in diff_text(shorter, plan)


# --- many plans ---------------------------------------------------------------------------------


def test_a_sweep_has_a_line_for_each_value() -> None:
    plan = replan(_plan(), Change(gpu_memory=2**32), H100)
    name, changes = parse_sweep("seq-len=64k..1M")
    lines = sweep_text(name, changes, sweep(plan, changes, H100)).split("\n")
    assert lines[0].split()[:2] == ["seq-len", "strategies"]
    assert [line.split()[0] for line in lines[1:6]] == [
        "65,536", "131,072", "262,144", "524,288", "1,048,576",
    ]  # fmt: skip
    assert lines[5].split()[1] == "none"
    assert lines[-1].startswith("1,048,576: no choice of strategies fits: 12 ranks need at least")
    assert max(map(len, lines[:6])) <= 100
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
    text = str(dataclasses.replace(_plan(), memory=memory))
    lines = text[text.index("by block of the model") :].split("\n")
    assert [line.strip() for line in lines[1:3]] == [
        "8.00 MiB  model.layers.{0..7}, 1.00 MiB each",
        "4.00 MiB  lm_head",
    ]


# --- through the command -----------------------------------------------------------------------


def test_a_saved_plan_is_shown_again(saved: Path) -> None:
    result = _run(str(saved))
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(_plan())


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
    assert elsewhere.total_ms > _plan().total_ms


def test_strict_also_holds_for_a_saved_plan(tmp_path: Path) -> None:
    overlooked = Declined(node="q", name="q", source="model.py:3", reason="softmax")
    path = tmp_path / "missed.json"
    path.write_text(dataclasses.replace(_plan(), missed=(overlooked,)).to_json())
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
        (["--max-seq-len"], "ringfx: the longest sequence needs a budget."),
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
        "ringfx: planning models:make needs --seq-len and --world-size;"
        " only a saved plan needs neither."
    )


# --- the page -----------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Texts, tags that stay open, and addresses that a page refers to."""

    VOID = ("meta", "br", "rect", "circle", "line", "polyline", "tr", "td", "th", "li", "p")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_one_well_formed_file_with_everything_in_it(
    saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.html"
    assert _run(str(saved), "--html", str(out)).stdout == f"written to {out}\n"
    page = _Page()
    page.feed(out.read_text())
    assert page.open == []
    assert page.addresses == []
    text = " ".join(" ".join(page.texts).split())
    for words in (
        "ringfx plan for 12 ranks on cuda",
        "model.layers.{0,2,4}.self_attn",
        "Time of attention by layer",
        "Other sequence lengths",
        "Other numbers of ranks",
        "524,288",
    ):
        assert words in text, words
    assert out.read_text().count("<svg") == 5
    assert "<script" not in out.read_text()


def test_the_page_shows_memory_and_escapes_what_a_model_says() -> None:
    plan = dataclasses.replace(
        _plan(),
        memory=MemoryPlan(
            parts=(MemoryPart(cause="parameters", bytes=2**30, kind="whole"),),
            over_program=(2**20, 2**30, 2**25),
            unknown=("optimiser state",),
        ),
        notes=(Note(text="a <b> & c"),),
    )
    page = to_html(plan)
    assert "Memory of one rank at the peak: 1.00 GiB" in page
    assert "not counted: optimiser state" in page
    assert "Memory over the program" in page
    assert page.count("<rect") - to_html(_plan()).count("<rect") == 1 + 3
    assert "a &lt;b&gt; &amp; c" in page


def test_a_page_that_cannot_be_written_says_so(saved: Path, tmp_path: Path) -> None:
    result = _run(str(saved), "--html", str(tmp_path / "absent" / "plan.html"))
    assert result.exit_code == 2
    assert "plan.html cannot be written: No such file or directory." in result.stderr


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no headless browser on this machine")
def test_a_browser_draws_the_page_to_its_end(saved: Path, tmp_path: Path) -> None:
    """Every chart has a size and nothing is wider than the window, as the browser measures it."""
    assert BROWSER is not None
    out = tmp_path / "plan.html"
    _run(str(saved), "--html", str(out))
    script = (
        "<script>addEventListener('load', () => { const size = e => e.getBoundingClientRect();"
        "document.title = JSON.stringify({charts: [...document.querySelectorAll('svg')]"
        ".map(e => size(e).height > 20 && size(e).width > 300),"
        "wide: document.documentElement.scrollWidth <= innerWidth})})</script></body>"
    )
    out.write_text(out.read_text().replace("</body>", script))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", out.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    title = html.unescape(done.stdout.split("<title>")[1].split("</title>")[0])
    assert json.loads(title) == {"charts": [True] * 5, "wide": True}


def test_the_page_answers_first_whether_it_fits_and_how_long_a_step_takes() -> None:
    def planned(length: int) -> Plan:
        return ringfx.plan(
            plain()(), (tokens(length),), world_size=2, gpu_memory="1TiB", profile="cpu-default"
        )

    page = to_html(planned(64), [(n, planned(n)) for n in (32, 64)])
    first = page[page.index("<h1>") :].split("<p>")[1]
    assert first.startswith("<b>fits 1.00 TiB: ")
    assert "tokens a second" in first
    assert "Time of one step on one rank" in page
    assert "<p>Time of one step</p>" in page
