"""Lines that a model logs, prints or warns: said after the program that they stand in.

A log line would end the program that Dynamo captures, and what is split would be gathered for
nothing. Here the call is kept aside while the graph goes on, and Dynamo's own bytecode makes it, in
order, as soon as the program has run. A tensor in the line is a copy of its value at the line, one
more result of the program: gathered when it is formatted, like any output.

Only programs that are traced for ringfx are changed; a line that cannot wait (it holds an object
that may change meanwhile, or stands in a checkpointed body and holds a tensor) breaks the graph as
ever.
"""

from __future__ import annotations

import builtins
import functools
import io
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ringfx.torch_compat.dynamo import CallbackArgs, callback_handler, unimplemented
from ringfx.torch_compat.dynamo_variables import (
    ConstantVariable,
    DebuggingVariable,
    FunctoolsPartialVariable,
    LoggingLoggerVariable,
    StringFormatVariable,
    TensorVariable,
    VariableTracker,
    install_identity_guard,
    rows_by_identity,
    wrapped,
)

__all__ = ["defer_logs"]

FUNCTIONS: Sequence[Callable[..., None]] = (
    builtins.print, warnings.warn, logging.debug, logging.info, logging.warning, logging.error,
    logging.critical, logging.exception, logging.log,
)  # fmt: skip
"""Functions that only say something."""

SAYING = re.compile(r"(debug|info|warn|warning|error|critical|fatal|exception|log)(_[a-z0-9_]+)?")
"""Methods of a logger that only say something, with what libraries add (``warning_once``)."""

ASKING = frozenset({"isEnabledFor", "getEffectiveLevel", "hasHandlers"})
"""Methods of a logger whose answer, as of tracing, is a constant."""


def defer_logs(is_for_ringfx: Callable[[Any], bool]) -> None:
    """Let programs go on across log lines, where ``is_for_ringfx(compiler)``."""
    method = LoggingLoggerVariable.call_method
    if not hasattr(method, "ringfx"):
        LoggingLoggerVariable.call_method = _logger_method(  # type: ignore[method-assign]
            method, is_for_ringfx
        )
    start = functools.partial(_add_rows, is_for_ringfx)
    start()
    named = [getattr(c, "func", None) for c in callback_handler.start_callbacks]
    if _add_rows not in named:  # torch._dynamo.reset() forgets both
        callback_handler.register_start_callback(start)


def _add_rows(is_for_ringfx: Callable[[Any], bool], _: CallbackArgs | None = None) -> None:
    rows = rows_by_identity()
    for function in FUNCTIONS:
        if not isinstance(rows.get(id(function)), functools.partial):
            usual = rows.get(id(function))
            rows[id(function)] = functools.partial(_function_row, usual, is_for_ringfx)


def _function_row(
    usual: Any, is_for_ringfx: Callable[[Any], bool], builder: Any, value: Any
) -> Any:
    rows = rows_by_identity()
    if value not in FUNCTIONS or not is_for_ringfx(builder.tx.output.compiler_fn):
        row = rows.pop(id(value))
        try:
            return usual(builder, value) if usual is not None else wrapped(builder, value)
        finally:
            rows[id(value)] = row
    install_identity_guard(builder)
    return _Saying(value, source=builder.source)


class _Saying(DebuggingVariable):
    """A function that only says something."""

    def call_function(
        self, tx: Any, args: Sequence[VariableTracker], kwargs: Mapping[str, VariableTracker]
    ) -> VariableTracker:
        line = _line(tx, self, args, kwargs)
        if line is None:
            unimplemented(
                gb_type="attempted to reorder a debugging function that can't actually be "
                "reordered",
                context=f"fn: {self.value}, args: {args}, kwargs: {kwargs}",
                explanation="The tensors in this log line may change before the line is printed.",
                hints=["Log tensors, numbers and strings only."],
            )
        return _say_later(tx, line)


def _logger_method(usual: Any, is_for_ringfx: Callable[[Any], bool]) -> Any:
    def call_method(
        self: LoggingLoggerVariable,
        tx: Any,
        name: str,
        args: list[VariableTracker],
        kwargs: dict[str, VariableTracker],
    ) -> VariableTracker:
        if is_for_ringfx(tx.output.compiler_fn):
            if name in ASKING and all(x.is_python_constant() for x in args):
                answer = getattr(self.value, name)(*(x.as_python_constant() for x in args))
                known: VariableTracker = ConstantVariable.create(answer)
                return known
            if SAYING.fullmatch(name):
                line = _line(tx, _Method(self, name), args, kwargs)
                if line is not None:
                    return _say_later(tx, line)
        result: VariableTracker = usual(self, tx, name, args, kwargs)
        return result

    call_method.ringfx = True  # type: ignore[attr-defined]
    return call_method


class _Method(VariableTracker):
    """A method of a logger; the logger is looked up when the line is said."""

    def __init__(self, logger: LoggingLoggerVariable, name: str) -> None:
        super().__init__()
        self.logger = logger
        self.name = name

    def reconstruct(self, codegen: Any) -> None:
        codegen(self.logger)
        codegen.extend_output(codegen.create_load_attrs(self.name))


class _Value(VariableTracker):
    """A Python value as it was at the line."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def reconstruct(self, codegen: Any) -> None:
        name = codegen.tx.output.install_global_by_id("__ringfx_said", self.value)
        codegen.append_output(codegen.create_load_global(name, add=True))


def _line(
    tx: Any,
    function: VariableTracker,
    args: Sequence[VariableTracker],
    kwargs: Mapping[str, VariableTracker],
) -> FunctoolsPartialVariable | None:
    """The call with its arguments as they are now; None if they cannot be kept."""
    given = [x.realize() for x in (*args, *kwargs.values())]
    if not all(_can_wait(tx, x) for x in given):
        return None
    kept = [_as_it_is(tx, x) for x in given]
    keywords = dict(zip(kwargs, kept[len(args) :], strict=True))
    return FunctoolsPartialVariable(function, kept[: len(args)], keywords)


def _say_later(tx: Any, line: FunctoolsPartialVariable) -> VariableTracker:
    # Of the outermost frame: Dynamo forgets what the frames that it inlines would say.
    tx.output.root_tx.debug_locals.append((line, []))
    return ConstantVariable.create(None)


def _can_wait(tx: Any, x: VariableTracker) -> bool:
    if isinstance(x, StringFormatVariable):
        return all(_can_wait(tx, v.realize()) for v in (*x.sym_args, *x.sym_kwargs.values()))
    if isinstance(x, TensorVariable):
        return tx.output.current_tracer is tx.output.root_tracer
    return _is_stream(x) or bool(x.is_python_constant())


def _is_stream(x: VariableTracker) -> bool:
    """``print(..., file=sys.stderr)``: looked up when the line is said."""
    return isinstance(getattr(x, "value", None), io.TextIOBase) and x.source is not None


def _as_it_is(tx: Any, x: VariableTracker) -> VariableTracker:
    if isinstance(x, StringFormatVariable):
        args = [_as_it_is(tx, v.realize()) for v in x.sym_args]
        kwargs = {k: _as_it_is(tx, v.realize()) for k, v in x.sym_kwargs.items()}
        return StringFormatVariable(x.format_string, args, kwargs)
    if isinstance(x, TensorVariable):  # a write after the line is not said
        copied: VariableTracker = x.call_method(tx, "detach", [], {}).call_method(
            tx, "clone", [], {}
        )
        return copied
    if isinstance(x, ConstantVariable) or _is_stream(x):
        return x
    return _Value(x.as_python_constant())
