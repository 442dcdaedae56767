"""How a command writes an argument of a Python function: as the option of its own that sets it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ringfx.units.argument import NAMED, Argument, Code, Spelling, in_python

__all__ = ["options_of"]

INSTEAD = {"shard_states": "state_ranks", "mp_policy": "param_dtype"}
"""Where a command has no option of that name, or a switch for a value that is no bool."""


def options_of(parameters: Iterable[Any]) -> Spelling:
    """Writes arguments as a command's options, by the parameters that it declares.

    An argument that the command has no option for stays as Python writes it.
    """
    options: Mapping[str, Any] = {p.name: p for p in parameters if p.opts[0].startswith("-")}

    def spelling(argument: Argument) -> str:
        option, value = options.get(argument.name), argument.value
        if option is not None and option.is_flag and (value is NAMED or isinstance(value, bool)):
            off = [*option.secondary_opts, f"no {option.opts[0]}"]
            return str(off[0] if value is False else option.opts[0])
        if option is None or option.is_flag:
            option = options.get(INSTEAD.get(argument.name, ""))
        if option is None:
            return in_python(argument)
        if value is NAMED:
            return str(option.opts[0])
        if isinstance(value, Code):
            return f"{option.opts[0]} {value.option or option.metavar}"
        return f"{option.opts[0]} {_word(value)}"

    return spelling


def _word(value: object) -> str:
    """One word of a command line."""
    text = str(value)
    return text if text.isprintable() and text and " " not in text else repr(text)
