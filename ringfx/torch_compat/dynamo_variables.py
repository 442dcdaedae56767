"""How Dynamo sees an object that a program meets: loading this module loads Dynamo.

Ringfx adds rows to its table of objects: functions of attention packages are traced as plain forms
of them, and log lines are said after the program. Without any of these: both end the program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._dynamo import variables
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.variables import base, functions, misc
from torch._dynamo.variables.builder import VariableBuilder

__all__ = [
    "ConstantVariable", "DebuggingVariable", "FunctoolsPartialVariable", "LoggingLoggerVariable",
    "PolyfilledFunctionVariable", "StringFormatVariable", "TensorVariable", "VariableTracker",
    "install_identity_guard", "rows_by_identity", "wrapped",
]  # fmt: skip

VariableTracker = base.VariableTracker
ConstantVariable = variables.ConstantVariable
TensorVariable = variables.TensorVariable
PolyfilledFunctionVariable = variables.PolyfilledFunctionVariable
FunctoolsPartialVariable = functions.FunctoolsPartialVariable
DebuggingVariable = misc.DebuggingVariable
LoggingLoggerVariable = misc.LoggingLoggerVariable
StringFormatVariable = misc.StringFormatVariable


def rows_by_identity() -> dict[int, Callable[[Any, Any], Any]]:
    """Dynamo's table from the identity of an object to how it is traced."""
    rows: dict[int, Callable[[Any, Any], Any]] = VariableBuilder._id_dispatch()
    return rows


def wrapped(builder: Any, value: Any) -> Any:
    """What Dynamo makes of an object that has no row."""
    return builder._wrap(value)


def install_identity_guard(builder: Any) -> Any:
    """The program holds for this very object."""
    return builder.install_guards(GuardBuilder.ID_MATCH)
