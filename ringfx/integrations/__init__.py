"""Other libraries' training loops over a split sequence: accelerate, Lightning, Trainer."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["accelerate", "lightning", "transformers"]


def __getattr__(name: str) -> Any:
    """Loaded when first asked for: neither library is needed for the others."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
