"""Arguments as texts name them: Python's where a function was called, options where a command runs.

A text that says ``pass shard_states=True`` to someone who typed ``ringfx plan`` sends them
searching. So texts hold an ``Argument``, which knows its name and value; the way in says how it is
written (``ringfx/cli/spelling.py`` for commands).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["NAMED", "Argument", "Code", "Spelling", "in_python", "spelled"]


NAMED = object()
"""In place of a value: the text only names the argument."""


@dataclass(frozen=True)
class Code:
    """A value that only Python writes so; a command line takes it otherwise."""

    text: str
    option: str = ""
    """As a command's option takes it; empty: as its help says (``MODULE:NAME``)."""


@dataclass(frozen=True)
class Argument:
    """An argument of a public function by its name, with a value where the text gives one.

    It is made where the text is made, in the call, and not when a module is imported.

    >>> print(Argument("shard_states", True), Argument("chunks", "none"), Argument("gpu_memory"))
    shard_states=True chunks="none" gpu_memory
    >>> print(Argument("rules", Code("ringfx.RULES | {operator: rule}")))
    rules=ringfx.RULES | {operator: rule}
    """

    name: str
    value: object = NAMED

    def __str__(self) -> str:
        return _spelling.get()(self)


Spelling: TypeAlias = Callable[[Argument], str]


def in_python(argument: Argument) -> str:
    """As a keyword of a call."""
    if argument.value is NAMED:
        return argument.name
    return f"{argument.name}={_literal(argument.value)}"


def _literal(value: object) -> str:
    """As Python writes it, text in the quotes that the documentation uses."""
    if isinstance(value, Code):
        return value.text
    text = repr(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) and '"' not in text else text


_spelling: ContextVar[Spelling] = ContextVar("spelling", default=in_python)


@contextmanager
def spelled(spelling: Spelling) -> Iterator[None]:
    """Texts that are made inside write arguments in this way."""
    before = _spelling.set(spelling)
    try:
        yield
    finally:
        _spelling.reset(before)
