"""Detect: find every attention and say what it computes, without changing the program."""

from ringfx.passes.detect.candidate import Candidate, Detected
from ringfx.passes.detect.find import detect

__all__ = ["Candidate", "Detected", "detect"]
