"""Detect: find every attention and say what it computes, without changing the program."""

from ringfx.passes.detect.find import Candidate, Detected, detect

__all__ = ["Candidate", "Detected", "detect"]
