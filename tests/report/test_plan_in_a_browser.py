"""The pages of a plan in a real browser: no wider than the window, folding, light and dark, with
the figures of the plan's JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringfx.cost_model.choice.whatif import Change, replan
from ringfx.errors import OutOfMemory
from ringfx.ir.plan import Plan
from ringfx.report.plan_html import refused_html, to_html
from tests.report.pages import H100, full_plan
from tests.support.browser import SCHEMES, SIZES, luminance, needs_browser, show, started

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    plan = full_plan()
    lengths = [(n, replan(plan, Change(seq_len=n), H100)) for n in (2**15, 2**16, 2**17)]
    with pytest.raises(OutOfMemory) as refused:
        replan(plan, Change(gpu_memory=2**28), H100)
    lengths += [(2**18, refused.value)]  # type: ignore[list-item]
    texts = {
        "plan": to_html(plan, lengths, name="models.py:make_a_large_model"),
        "refused": refused_html(refused.value, "models.py:make", "65,536 tokens, 8 ranks"),
    }
    found = {name: folder / f"{name}.html" for name in texts}
    for name, text in texts.items():
        found[name].write_text(text)
    return found


def clicked(browser: Any) -> None:
    for summary in browser.find_elements("css selector", "summary"):
        if summary.is_displayed():
            summary.click()


WIDER = """
return [document.documentElement.scrollWidth, ...[...document.querySelectorAll('main *')]
  .map(e => e.getBoundingClientRect()).filter(r => r.width).map(r => Math.max(r.right, -r.left))]
"""


@pytest.mark.parametrize("name", ["plan", "refused"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_wider_than_the_window_folded_or_not(
    browser: Any, pages: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    show(browser, pages[name], size)
    assert browser.execute_script("return innerWidth") == size[0]
    assert max(browser.execute_script(WIDER)) <= size[0]
    clicked(browser)
    assert browser.execute_script("return document.querySelectorAll('details[open]').length")
    assert max(browser.execute_script(WIDER)) <= size[0]


@pytest.mark.parametrize("size", SIZES)
def test_the_first_screen_answers(
    browser: Any, pages: dict[str, Path], size: tuple[int, int]
) -> None:
    """Down to the last of its figures, without scrolling."""
    for name, words in (
        ("plan", (".verdict", "#peak", "#budget", ".track", "#step", "#rate", "#share")),
        ("refused", (".verdict", "#needed", "#budget", ".track", "#remedy")),
    ):
        show(browser, pages[name], size)
        for selector in words:
            place = browser.find_element("css selector", selector)
            assert place.is_displayed()
            assert place.rect["y"] + place.rect["height"] <= size[1], (name, selector)


def test_details_open_and_close(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["plan"], SIZES[1])
    folded = browser.find_elements("css selector", "details")
    assert len(folded) >= 7
    for details in folded:
        summary, *inner = details.find_elements("css selector", ":scope > *")
        assert details.get_attribute("open") is None
        assert inner
        assert not any(part.is_displayed() for part in inner)
        summary.click()
        assert all(part.is_displayed() for part in inner)
        summary.click()
        assert not any(part.is_displayed() for part in inner)


VALUES = "return [...document.querySelectorAll(arguments[0])].map(e => Number(e.value))"


def test_its_figures_are_those_of_the_json(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["plan"])
    plan = Plan.from_json(full_plan().to_json())
    fields = json.loads(plan.to_json())
    assert plan.step is not None
    assert plan.step_ms is not None

    def of(selector: str) -> list[float]:
        return browser.execute_script(VALUES, selector)

    peak = sum(part["bytes"] for part in fields["memory"]["parts"])
    assert (of("#peak"), of("#budget")) == ([peak], [fields["gpu_memory"]])
    assert of("#step") == pytest.approx([plan.step_ms])
    assert of("#rate") == pytest.approx([1e3 * fields["step"]["tokens"] / plan.step_ms])
    attention = sum(layer["forward_ms"] + layer["backward_ms"] for layer in fields["layers"])
    assert of("#attention") == pytest.approx([attention])
    assert sum(of("#layers summary data")) == pytest.approx(attention)
    moved = sum(move["bytes_moved"] for move in fields["collectives"])
    assert sum(of("#moves summary data")) == moved
    assert sum(of("#memory > .parts data, #memory summary data")) == peak
    assert sum(of("#memory .parts data")) == peak
    assert sum(of("#time > .parts data, #time summary data")) == pytest.approx(plan.step_ms)
    told = browser.find_element("css selector", "h1").text
    assert " ".join(told.split()) == "Fits 65.0 GiB of 80.0 GiB a rank"


def test_the_bar_is_as_full_as_the_budget(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["plan"])
    full, *parts = browser.execute_script(
        "return [...document.querySelectorAll('.track, .track i')]"
        ".map(e => e.getBoundingClientRect().width)"
    )
    assert sum(parts) / full == pytest.approx(65 / 80, abs=0.01)
    assert parts == sorted(parts[:-1], reverse=True) + parts[-1:], "the rest comes last"


TEXTS = """
const ground = e => { for (; e; e = e.parentElement) {
  const c = getComputedStyle(e).backgroundColor; if (!c.endsWith(', 0)')) return c } };
return [...document.querySelectorAll('main *')]
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
  .map(e => [e.tagName + '.' + e.className, getComputedStyle(e).color, ground(e)])
"""


@pytest.mark.parametrize("name", ["plan", "refused"])
def test_light_and_dark_differ_and_every_text_can_be_read(
    browser: Any, pages: dict[str, Path], name: str
) -> None:
    """Contrast of at least 4.5, as WCAG asks of small text."""
    grounds = {}
    for scheme in SCHEMES:
        show(browser, pages[name], scheme=scheme)
        for where, colour, ground in browser.execute_script(TEXTS):
            dark, light = sorted((luminance(colour), luminance(ground)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, where, colour, ground)
            grounds[scheme] = ground
    assert luminance(grounds["light"]) > 0.8
    assert luminance(grounds["dark"]) < 0.05
