"""A real browser for pages: Debian's chromium and chromium-driver, or others so named."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

__all__ = ["SCHEMES", "SIZES", "luminance", "needs_browser", "show", "started", "width"]

PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
MISSING = [name for name, path in PROGRAMS.items() if path is None]
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

SIZES = ((1280, 900), (390, 844))
SCHEMES = ("light", "dark")


@contextmanager
def started() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS["chromium"]
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    service = webdriver.ChromeService(executable_path=PROGRAMS["chromedriver"])
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def show(browser: Any, page: Path, size: tuple[int, int] = SIZES[0], scheme: str = "light") -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 800}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())


def width(browser: Any) -> int:
    """Of the page: more than the window's where it scrolls sideways."""
    found: int = browser.execute_script("return document.documentElement.scrollWidth")
    return found


def luminance(colour: str) -> float:
    """Of ``rgb(r, g, b)``, as WCAG defines it."""
    parts = [int(x) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
