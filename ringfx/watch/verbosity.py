"""How much ringfx says on stderr."""

from __future__ import annotations

import logging
import sys

from ringfx.errors import InvalidArgument
from ringfx.validation.names import named_arguments

__all__ = ["set_verbosity"]

LEVELS = {
    "silent": logging.CRITICAL + 1,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}


@named_arguments
def set_verbosity(level: str) -> None:
    """Let the logger ``ringfx`` write so much, and on stderr if nothing else listens to it.

    ``TORCH_LOGS=ringfx`` and ``TORCH_LOGS=+ringfx`` in the environment are "info" and "debug".

    Parameters
    ----------
    level
        ``"silent"``; ``"error"``; ``"warning"`` (the default: gathers, replicated attention, graph
        breaks); ``"info"``: also each program's stages and the plan's notes; ``"debug"``: also each
        plan.

    Raises
    ------
    InvalidArgument
        Another level.
    """
    if level not in LEVELS:
        known = ", ".join(map(repr, LEVELS))
        raise InvalidArgument(f"set_verbosity: level is {level!r}. Do: pass one of {known}.")
    log = logging.getLogger("ringfx")
    log.setLevel(LEVELS[level])
    if not log.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
