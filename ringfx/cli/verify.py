"""``ringfx verify``: build a model, and compare it split with itself unsplit."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ringfx import api
from ringfx.cli.model_target import Inputs, Target, build, find_target, floating_dtype
from ringfx.comparison.reduced import LONGEST
from ringfx.comparison.report import Verification
from ringfx.comparison.run import refuse_too_large, verify
from ringfx.cost_model import parse_tokens
from ringfx.errors import InvalidArgument

__all__ = ["Asked", "run"]

MOST_TO_BUILD = 200_000_000
"""Parameters of a model that is built whole before it is reduced; a larger one has no weights."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is compared."""

    target: str
    seq_len: str | None
    batch_size: int
    world_size: int
    reduce: bool
    train: bool
    labels: bool
    hf: bool
    narrow: str | None
    options: Mapping[str, Any]
    """Of ``ringfx.optimize``."""


def run(asked: Asked) -> Verification:
    """Build, compare, print the report.

    Raises
    ------
    RingfxError
        Whatever is wrong with the request or the model, or fails on a rank.
    """
    narrow = None if asked.narrow in (None, "none") else floating_dtype(asked.narrow)
    with Console(stderr=True).status(f"importing {asked.target}") as status:
        _let_ranks_import(asked.target)
        factory = find_target(asked.target, hf=asked.hf)
        status.update(f"building {asked.target}")
        made = _built(factory, asked)
        made.model.train(asked.train)
        with torch.set_grad_enabled(asked.train):
            found = verify(
                made.model, *made.args, kwargs=dict(made.kwargs), world_size=asked.world_size,
                reduce=asked.reduce, narrow=narrow, says=status.update, **asked.options,
            )  # fmt: skip
    if made.has_own_length and asked.seq_len is not None:
        note = f"--seq-len was not used: {asked.target} takes no seq_len and returns its own inputs"
        found = replace(found, notes=(*found.notes, note))
    print(found)
    return found


def _let_ranks_import(target: str) -> None:
    """A file's module, under the name that it is imported by here."""
    where = target.rpartition(":")[0]
    if where.endswith(".py"):
        sys.path.append(str(Path(where).resolve().parent))


def _built(factory: Callable[..., Any], asked: Asked) -> Target:
    """With weights, or on the meta device where a large model is reduced before it gets some."""
    length = LONGEST if asked.seq_len is None else parse_tokens(asked.seq_len)
    inputs = Inputs(
        seq_len=length, is_asked=asked.seq_len is not None, batch_size=asked.batch_size,
        labels=asked.labels and asked.train,
    )  # fmt: skip
    shape: Target | None = None
    with contextlib.suppress(InvalidArgument), api.offline():  # what needs values has them below
        shape = build(factory, inputs, asked.target)
    if shape is not None and not asked.reduce:
        refuse_too_large(shape.model, asked.world_size, False)
    if shape is not None and asked.reduce and _parameters(shape.model) > MOST_TO_BUILD:
        return shape
    made = build(factory, inputs, asked.target)
    if shape is not None and made.is_invented:  # values are drawn for what is on meta
        return replace(made, kwargs=shape.kwargs)
    return made


def _parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
