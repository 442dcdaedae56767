"""The documentation's site in a real browser: read at two widths, light and dark, and followed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import SCHEMES, SIZES, luminance, needs_browser, show, started, width

pytest.importorskip("mkdocs", reason="mkdocs is not installed")
pytestmark = needs_browser

ROOT = Path(__file__).parent.parent
BUILT = ROOT / "build" / "site"
"""Where `make test` has just built the site."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as driver:
        yield driver


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site that is there, if no page is newer; else one of its own."""
    pages = [ROOT / "README.md", ROOT / "mkdocs.yml", *(ROOT / "docs").rglob("*.*")]
    first = BUILT / "index.html"
    if first.exists() and first.stat().st_mtime > max(page.stat().st_mtime for page in pages):
        return BUILT
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_the_first_page_is_read_and_a_link_is_followed(
    browser: Any, site: Path, size: tuple[int, int]
) -> None:
    grounds = {}
    for scheme in SCHEMES:
        show(browser, site / "index.html", size, scheme)
        browser.execute_script("localStorage.clear()")  # the theme keeps what it showed last
        browser.refresh()
        assert width(browser) <= size[0]
        title = browser.find_element("css selector", "article h1")
        assert title.text.startswith("ringfx")
        assert title.is_displayed()
        body = browser.find_element("css selector", "body")
        grounds[scheme] = luminance(body.value_of_css_property("background-color"))
        colour = browser.find_element("css selector", "article p").value_of_css_property("color")
        assert abs(luminance(colour) - grounds[scheme]) > 0.4, scheme
    assert grounds["light"] > 0.8
    assert grounds["dark"] < 0.05
    link = browser.find_element("css selector", 'article a[href$="start.html"]')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", link)
    link.click()
    assert browser.find_element("css selector", "article h1").text.startswith("Getting started")
    assert width(browser) <= size[0]


WIDE = ("planning", "errors/InvalidArgument", "cost-model", "coverage/split", "api/index")
"""Pages of wide tables, long words and formulas."""


@pytest.mark.parametrize("page", WIDE)
def test_no_page_is_wider_than_a_phone(browser: Any, site: Path, page: str) -> None:
    show(browser, site / f"{page}.html", SIZES[1])
    assert browser.find_element("css selector", "article h1").is_displayed()
    assert width(browser) <= SIZES[1][0]
