"""The one reader of what files hold: JSON in, values of frozen dataclasses out, or one clear error.

The dataclasses themselves are the schema: pydantic checks the types and ranges that annotate their
fields (``ringfx.validation.fields``). Unknown fields are refused: a misspelt one would be lost in
silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, NoReturn, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from ringfx.errors import RingfxError

__all__ = ["Source", "parse_json", "shown", "validated"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is read, for the texts of errors."""

    where: str
    """Begins an error about the text: ``profile mine.json``."""
    damaged: str
    """Begins an error about a value: ``profile mine.json is damaged``."""
    error: type[RingfxError]
    remedy: str
    """What to do, ending every error."""

    def refuse(self, problem: str, *, damaged: bool = True) -> NoReturn:
        head = self.damaged if damaged else self.where
        raise self.error(f"{head}: {problem}. Do: {self.remedy}.")


def parse_json(text: str, source: Source) -> Any:
    """What the text says; no field twice, and no deeper than a reader can go."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            source.refuse(f"the field {shown(twice)} is given twice", damaged=False)
        return found

    try:
        return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        source.refuse(f"line {error.lineno} is not JSON ({error.msg})", damaged=False)
    except RecursionError:
        source.refuse("its lists and objects are nested too deeply", damaged=False)
    except ValueError:  # of an integer with thousands of digits
        source.refuse("it has a number with thousands of digits", damaged=False)


def validated(
    kind: type[T],
    content: object,
    source: Source,
    problems: Callable[[T], Iterable[str]] = lambda value: (),
) -> T:
    """``content``, as JSON gives it, as a value of the dataclass ``kind``.

    Parameters
    ----------
    problems
        What no single field shows: a text for each thing in the value that contradicts another.

    Raises
    ------
    RingfxError
        Of the source's type: names the first field that is wrong, its value and what was expected.
    """
    try:
        value: T = _adapter(cast(Any, kind)).validate_json(json.dumps(content))
    except ValidationError as error:
        source.refuse(_words(error, kind))
    except RecursionError:
        source.refuse("its lists and objects are nested too deeply")
    for problem in problems(value):
        source.refuse(problem)
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def shown(value: object, width: int = 60) -> str:
    """A value in an error text, short."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


# --- words for what pydantic found ----------------------------------------------------------------


def _words(error: ValidationError, kind: Any) -> str:
    found = error.errors(include_url=False)
    unknown = [e for e in found if e["type"] == "unexpected_keyword_argument"]
    first: Mapping[str, Any] = (unknown or found)[0]
    path = _path(first["loc"])
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return _problem(first, path, kind) + more


def _problem(error: Mapping[str, Any], path: str, kind: Any) -> str:
    names = "; known are " + ", ".join(field.name for field in fields(kind))
    known = names if len(error["loc"]) == 1 else ""
    match error["type"]:
        case "missing" | "missing_argument":
            return f"field {path!r} is missing{known}"
        case "unexpected_keyword_argument":
            return f"unknown field {shown(path)}{known}"
        case "json_invalid":
            return (
                "it contains a character or number that JSON does not allow: "
                f"{error['ctx']['error']}"
            )
        case "value_error":
            return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
    return f"{path or 'it'} must be {_expected(error)}; got {shown(error['input'])}"


EXPECTED: Mapping[str, str] = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "string_unicode": "a string",
    "string_pattern_mismatch": "a string of the form {pattern}",
    "string_too_long": "a string of at most {max_length} characters",
    "bool_type": "true or false",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "tuple_type": "a list",
    "dataclass_type": "an object with fields",
    "none_required": "null",
}


def _expected(error: Mapping[str, Any]) -> str:
    template = EXPECTED.get(error["type"])
    if template is None:
        return str(error["msg"]).lower()
    context = error.get("ctx", {})
    return template.format(
        **{k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()}
    )


def _path(location: Sequence[int | str]) -> str:
    """``layers[3].site.heads``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
