"""Trace a package's function as its replacement in plain torch, for ringfx alone.

Dynamo asks a table "how is this object traced?" by the object's identity. Ringfx adds rows for the
functions in ``package_calls``; a row looks at which compiler the trace is for, and lets Dynamo go
its usual way for every other. So an ordinary ``torch.compile`` in the same process is not changed,
no package is imported (only modules that are already loaded are looked at), and the package's own
function runs wherever a replacement breaks the graph.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ringfx.passes.detect.package_calls import PACKAGE_CALLS
from ringfx.torch_compat.dynamo import CallbackArgs, callback_handler
from ringfx.torch_compat.dynamo_variables import (
    PolyfilledFunctionVariable,
    install_identity_guard,
    rows_by_identity,
    wrapped,
)

__all__ = ["for_ringfx", "is_for_ringfx", "keep_substituting", "substitute_loaded"]

_MARK = "traces_for_ringfx"


def for_ringfx(backend: Any) -> Any:
    """Mark a Dynamo backend: programs that are traced for it see the replacements."""
    setattr(backend, _MARK, True)
    return backend


def keep_substituting() -> None:
    """Look at the loaded packages now and at the start of every compilation."""
    substitute_loaded()
    if _at_start not in callback_handler.start_callbacks:  # torch._dynamo.reset() forgets it
        callback_handler.register_start_callback(_at_start)


def _at_start(_: CallbackArgs) -> None:
    substitute_loaded()


def substitute_loaded() -> None:
    """Add a row for each function of a loaded module that has a replacement."""
    rows = rows_by_identity()
    for module_name, functions in PACKAGE_CALLS.items():
        module = sys.modules.get(module_name)
        for name, replacement in functions.items() if module is not None else ():
            original = getattr(module, name, None)
            if original is None or id(original) in rows:
                continue
            traced = adapted(original, replacement)
            if traced is not None:
                rows[id(original)] = functools.partial(_row, original, traced)


def adapted(original: Callable[..., Any], replacement: Callable[..., Any]) -> Any:
    """The replacement under the original's signature; None if that has parameters unknown to it.

    Versions of a package add, drop and move parameters: arguments are matched by name.
    """
    known = inspect.signature(replacement).parameters
    try:
        own = inspect.signature(original).parameters
    except (TypeError, ValueError):
        own = known
    if set(own) - set(known) or set(_required(known)) - set(own):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in own.values()):
        replacement.__torch_dynamo_polyfill__ = replacement  # type: ignore[attr-defined]
        return replacement
    positional = tuple(n for n, p in own.items() if p.kind is p.POSITIONAL_OR_KEYWORD)

    def traced(*args: Any, **kwargs: Any) -> Any:  # fewer arguments than names may be given
        return replacement(**dict(zip(positional, args)), **kwargs)  # noqa: B905

    traced.__torch_dynamo_polyfill__ = traced  # type: ignore[attr-defined]
    return traced


def _required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    return [n for n, p in parameters.items() if p.default is p.empty]


def _row(original: Any, traced: Callable[..., Any], builder: Any, value: Any) -> Any:
    rows = rows_by_identity()
    if value is not original or not is_for_ringfx(builder.tx.output.compiler_fn):
        row = rows.pop(id(value))
        try:
            return wrapped(builder, value)
        finally:
            rows[id(value)] = row
    guards = install_identity_guard(builder)
    return PolyfilledFunctionVariable(traced, source=builder.source, **guards)


def is_for_ringfx(backend: Any) -> bool:
    """Whether a backend, under the wrappers that torch puts around it, is ringfx's."""
    while backend is not None:
        if getattr(backend, _MARK, False):
            return True
        inner = getattr(backend, "_torchdynamo_orig_backend", None)
        backend = inner or getattr(backend, "compiler_fn", None) or getattr(backend, "func", None)
    return False
