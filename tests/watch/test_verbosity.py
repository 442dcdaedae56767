"""How much ringfx says: its own function, and torch's variable."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

import ringfx

log = logging.getLogger("ringfx")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    level, handlers, propagate = log.level, list(log.handlers), log.propagate
    yield
    log.setLevel(level)
    log.handlers[:], log.propagate = handlers, propagate


def test_levels_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    log.propagate = False  # pytest listens at the root
    ringfx.set_verbosity("info")
    log.info("planned")
    log.debug("not said")
    ringfx.set_verbosity("silent")
    log.error("not said either")
    assert capsys.readouterr().err == "ringfx: planned\n"


def test_another_level_is_refused() -> None:
    with pytest.raises(
        ringfx.RingfxError, match=r"level is 'loud'\. Do: pass one of 'silent', 'error'"
    ):
        ringfx.set_verbosity("loud")


@pytest.mark.slow
@pytest.mark.parametrize(("words", "level"), [("ringfx", logging.INFO), ("+ringfx", logging.DEBUG)])
def test_torchs_variable_sets_the_level(words: str, level: int) -> None:
    code = "import logging, ringfx, torch; print(logging.getLogger('ringfx').getEffectiveLevel())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TORCH_LOGS": words},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == level
