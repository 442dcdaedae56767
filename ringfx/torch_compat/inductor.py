"""Inductor: loading this module loads its settings, and the compiler itself when first asked for.

Each name says what it is needed for and, after "Without", what a release that drops it breaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._inductor import config, custom_graph_pass

__all__ = ["CustomGraphPass", "compiled_by_inductor", "config", "hash_of_files"]

CustomGraphPass = custom_graph_pass.CustomGraphPass
"""A pass over Inductor's graph. Without: Inductor may fuse attention wrongly
(`ringfx/compile/inductor_no_fusion.py`)."""

hash_of_files = custom_graph_pass.get_hash_for_files
"""Names such a pass in Inductor's cache. Without: the same."""


def compiled_by_inductor(
    gm: torch.fx.GraphModule, inputs: list[Any], settings: Mapping[str, Any]
) -> Any:
    """The program, compiled. Without: ``compiler="inductor"``."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, inputs, config_patches=dict(settings))
