"""Stages of a program: in the log always, on a terminal as they pass."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from ringfx.watch import stages
from ringfx.watch.stages import preparing, stage_done


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, is_terminal: bool = True) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=80)
    monkeypatch.setattr(stages, "Console", lambda stderr: console)
    return written


def test_stages_and_their_seconds_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ringfx")
    with preparing("program 1", rank=0):
        for stage in ("captured", "detected", "placed", "compiled"):
            stage_done(stage)
    assert caplog.messages == [
        "program 1: captured 0.0 s, detected 0.0 s, placed 0.0 s, compiled 0.0 s"
    ]
    stage_done("nobody's")
    assert len(caplog.messages) == 1


def test_a_terminal_shows_them_on_rank_0_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, is_shown in ((0, True), (1, False)):
        written = on_a_terminal(monkeypatch)
        with preparing("program 1", rank=rank):
            stage_done("captured")
        assert ("ringfx: program 1" in written.getvalue()) == is_shown


def test_what_is_no_terminal_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    written = on_a_terminal(monkeypatch, is_terminal=False)
    with preparing("program 1", rank=0):
        stage_done("captured")
    assert written.getvalue() == ""


def test_an_error_ends_the_program(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ringfx")
    with pytest.raises(ValueError, match="seventeen"), preparing("program 1", rank=0):
        raise ValueError("seventeen")
    stage_done("nobody's")
    assert caplog.messages == []
