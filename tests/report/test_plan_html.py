"""The page of a plan as text; tests/report/test_plan_in_a_browser.py looks at it."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import ringfx
from ringfx.cli.main import app
from ringfx.errors import OutOfMemory, Shortfall
from ringfx.ir.memory_plan import MemoryPart, MemoryPlan
from ringfx.ir.note import Note
from ringfx.ir.plan import Plan
from ringfx.report.charts import Value, chart
from ringfx.report.plan_html import refused_html, to_html
from ringfx.units.format import format_bytes
from tests.end_to_end.models import plain, tokens
from tests.report.pages import attention_plan, full_plan


class _Page(HTMLParser):
    """Texts, tags that stay open, and addresses that a page refers to."""

    VOID = ("meta", "br", "rect", "line", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(attention_plan().to_json())
    return path


def _run(*words: str) -> Result:
    return CliRunner().invoke(app, ["plan", *words])


def test_the_page_is_one_well_formed_file_with_everything_in_it(
    saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.html"
    assert _run(str(saved), "--html", str(out)).stdout == f"written to {out}\n"
    both = _run(str(saved), "--html", str(out), "--json")
    assert Plan.from_json(both.stdout) == attention_plan()
    assert both.stderr == f"written to {out}\n"
    page = _Page(out.read_text())
    assert page.addresses == []
    for words in (
        f"ringfx plan {saved}",
        "12 ranks on cuda",
        "model.layers.{0,2,4}.self_attn",
        "Attention by layer",
        "Other lengths",
        "Other numbers of ranks",
        "524,288",
        "512k",
    ):
        assert words in page.text, words
    assert out.read_text().count("<svg") == 4
    assert "<script" not in out.read_text()
    assert "url(" not in out.read_text()
    assert "@import" not in out.read_text()


def test_the_page_shows_memory_and_escapes_what_a_model_says() -> None:
    plan = dataclasses.replace(
        attention_plan(),
        memory=MemoryPlan(
            parts=(MemoryPart(cause="parameters", bytes=2**30, kind="whole"),),
            over_program=(2**20, 2**30, 2**25),
            unknown=("optimizer state",),
        ),
        notes=(Note(text="a <b> & c"),),
    )
    page = to_html(plan, name="<i>model</i>")
    assert "1.00 GiB a rank at the peak" in _Page(page).text
    assert "not counted: optimizer state" in page
    assert "Memory over the program" in page
    assert page.count("<rect") == 3
    larger = dataclasses.replace(plan.memory, over_program=(2**20, 2**31))
    assert "<rect" not in to_html(dataclasses.replace(plan, memory=larger))
    assert "a &lt;b&gt; &amp; c" in page
    assert "&lt;i&gt;model" in page


def test_a_page_that_cannot_be_written_says_so(saved: Path, tmp_path: Path) -> None:
    result = _run(str(saved), "--html", str(tmp_path / "absent" / "plan.html"))
    assert result.exit_code == 2
    assert "plan.html cannot be written: No such file or directory." in result.stderr


def test_the_page_answers_first_whether_it_fits_and_how_long_a_step_takes() -> None:
    def planned(length: int) -> Plan:
        return ringfx.plan(
            plain()(), (tokens(length),), world_size=2, gpu_memory="1TiB", profile="cpu-default"
        )

    page = _Page(to_html(planned(64), [(n, planned(n)) for n in (32, 64)])).text
    first = page[page.index("Fits") :][:400]
    assert first.startswith("Fits ")
    assert " of 1.00 TiB a rank" in first
    assert "tokens a second" in first
    assert "What a step's time is made of" in page
    assert "Time of a step" in page


def test_a_page_of_a_model_without_attention_has_no_layers() -> None:
    page = _Page(to_html(dataclasses.replace(full_plan(), layers=()))).text
    assert "Fits 65.0 GiB of 80.0 GiB a rank" in page
    assert "Attention by layer" not in page
    assert "in attention" not in page


def test_messages_are_folded_by_kind() -> None:
    page = _Page(to_html(full_plan())).text
    kinds = page[page.index("Messages outside attention") :]
    assert kinds.index("all_gather 8 x") < kinds.index("all_reduce in backward 33 x")
    assert "sorts all tokens moe.py:4" in kinds
    assert "model.layers.{0..31}.mlp.weight 32 x 86.0 MiB" in kinds


def test_a_budget_that_nothing_fits_gets_a_page_with_the_cheapest_change_first(
    saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.html"
    result = _run(str(saved), "--gpu-memory", "64MiB", "--html", str(out))
    assert result.exit_code == 2
    first, *text = result.stderr.splitlines()
    assert first == f"written to {out}"
    assert text[0].startswith("ringfx: no choice of strategies fits: 12 ranks need at least")
    changes = [line.strip() for line in text if "ranks or more" in line or "or fewer" in line]
    assert len(changes) == 2
    page = _Page(out.read_text())
    assert page.addresses == []
    start = page.text[page.text.index("Does not fit", 30) :]
    assert start.startswith("Does not fit ")
    assert "or more needed, the budget is 64.0 MiB" in start
    assert f"The cheapest change {changes[0].rstrip(',')} or {changes[1].rstrip('.')}" in start


def test_a_budget_that_parameters_exceed_alone_has_figures_too() -> None:
    with pytest.raises(OutOfMemory) as caught:
        ringfx.plan(plain()(), (tokens(64),), world_size=2, gpu_memory="10kB")
    found = caught.value.shortfall
    assert found is not None
    assert found.budget == 10_000
    assert found.needed == sum(size for _, size in found.causes) > 10_000
    page = _Page(refused_html(caught.value)).text
    assert format_bytes(found.needed) in page
    assert "pass shard_states=True on " in page


def test_a_curve_marks_what_does_not_fit_and_where_the_budget_lies() -> None:
    values = [
        Value(at=2**i, label="", amount=2.0**i if i < 4 else None, is_here=i == 1, fits=i < 3)
        for i in range(5)
    ]
    drawn = chart("memory", values, lambda x: f"{x:g}", 4.0, "budget")
    xs, ys = [mark.x for mark in drawn.marks], [mark.y for mark in drawn.marks]
    assert xs == sorted(xs)
    assert ys[:4] == sorted(ys[:4], reverse=True)
    assert drawn.limit == ys[2]
    assert drawn.limit_side == "left"
    assert [mark.words for mark in drawn.marks] == ["1", "2", "4", "≥ 8", "no plan"]
    assert len(drawn.line.split()) == 3


def test_needs_of_what_does_not_fit_are_drawn() -> None:
    plan = full_plan()
    error = OutOfMemory(
        "no choice fits", Shortfall(needed=2**40, budget=2**36, causes=(), remedies=("less",))
    )
    page = _Page(to_html(plan, [(4096, plan), (8192, plan), (16384, error)])).text
    assert "≥ 1.00 TiB" in page
    assert "16,384 no choice fits" in page
