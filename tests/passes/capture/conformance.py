"""What capture does with each construct: the table behind docs/capture.md, one row a construct.

``python -m tests.passes.capture.conformance`` writes the page; test_conformance.py holds every row:
outputs, gradients, buffers and inputs equal to eager's in float64, at one rank and at two; or the
refusal's words and its source line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.models import constructs, control, gradient_hooks, torch_layers
from tests.models.shapes import HIDDEN
from tests.models.transforms import FLEX, TRANSFORMS, Flex, Transformed
from tests.models.writes import (
    BUFFERS,
    REFUSED_WRITES,
    WRITES,
    RefusedWrites,
    Writes,
    WritesBuffers,
)

__all__ = ["PAGE", "ROWS", "Row", "page", "sequence"]

PAGE = Path(__file__).parents[3] / "docs" / "capture.md"
SEQ_LEN = 7


def sequence() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, SEQ_LEN, HIDDEN, generator=generator).requires_grad_(),)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One construct, in a small module between two attentions."""

    group: str
    name: str
    model: Callable[[], nn.Module]
    refused: str = ""
    """Words of the refusal; empty where the construct is carried."""
    why: str = ""
    """For a refusal, the reason in a few words."""
    inputs: Callable[[], Any] = sequence
    trains: bool = True
    """Whether gradients are compared (False: run without gradients)."""
    steps: int = 1


HOW = {
    "activation checkpointing": "the body is run in place; its calls are tagged for AOTAutograd's "
    "partitioner, which recomputes them in backward, as a policy of selective checkpointing says",
    "gradients": "regions keep their mode; a torch.autograd.Function stays one call with its own "
    "backward; it is split if both bodies prove it, else it runs on gathered values, announced; a "
    "hook on a gradient is the own backward of an identity",
    "writes in place": "every write is a value; views are put back into their base and made again",
    "buffers and inputs written": "new values are results of the program, copied into the user's "
    "tensors after the run, equally on all ranks",
    "torch.func": "traced below autograd, where mapping is broadcasting",
    "flex attention": "score and mask functions are mapped over positions and recovered from there",
    "layers": "fused operators are decomposed",
    "random operators": "each rank draws for the complete tensor, so that any split draws the same",
    "control flow": "log lines are printed at the end of their program; control flow that depends "
    "on data breaks the graph; sharded values stay sharded if the next program can take them so",
    "numbers": "complex values are carried as they are",
    "results": "outputs of the model may stay sharded",
}


def rows() -> Iterator[Row]:
    make = functools.partial
    for name, model in constructs.CHECKPOINTS.items():
        yield Row(group="activation checkpointing", name=name, model=model)
    for name, model in constructs.GRADIENTS.items():
        yield Row(group="gradients", name=name, model=model)
    for name, model in gradient_hooks.models().items():
        yield Row(group="gradients", name=name, model=model)
    yield Row(
        group="gradients", name="a gradient hook that reads what its tensor's uses make",
        model=make(gradient_hooks.Hooked, "too late"), refused="gradient hook reads a value",
        why="the hook stands before the first use"
    )  # fmt: skip
    yield Row(
        group="gradients",
        name="an autograd.Function that writes into its input without mark_dirty",
        model=constructs.HiddenWrite, refused="writes into its inputs",
        why="tracing keeps it as one call, whose operands are values"
    )  # fmt: skip
    for name in WRITES:
        yield Row(group="writes in place", name=name, model=make(Writes, name))
    for name, (words, why) in REFUSED_WRITES.items():
        yield Row(
            group="writes in place", name=name, model=make(RefusedWrites, name),
            refused=words, why=why,
        )  # fmt: skip
    for name in BUFFERS:
        yield Row(
            group="buffers and inputs written", name=name, model=make(WritesBuffers, name), steps=2
        )
    for name in TRANSFORMS:
        yield Row(group="torch.func", name=name, model=make(Transformed, name))
    for name in FLEX:
        yield Row(group="flex attention", name=name, model=make(Flex, name))
    for name, model in torch_layers.LAYERS.items():
        yield Row(group="layers", name=name, model=model)
    for name, model in torch_layers.EVALUATED.items():
        yield Row(group="layers", name=name, model=model, trains=False)
    for name, model in control.RANDOM.items():
        yield Row(group="random operators", name=name, model=model)
    for name, model in control.CONTROL.items():
        yield Row(group="control flow", name=name, model=model)
    for name, (model, words, why) in control.REFUSED_CONTROL.items():
        yield Row(group="control flow", name=name, model=model, refused=words, why=why)
    yield Row(group="numbers", name="complex rotation", model=constructs.Rotated)
    yield Row(
        group="results", name="keys and values of every layer (use_cache)",
        model=constructs.cached_llama, inputs=constructs.token_ids,
    )  # fmt: skip


ROWS: tuple[Row, ...] = tuple(rows())


def page() -> str:
    """docs/capture.md."""
    carried = sum(not row.refused for row in ROWS)
    lines = [
        "# What capture carries",
        "",
        "Made by `python -m tests.passes.capture.conformance`. `test_conformance.py` beside it",
        "holds every row: outputs, gradients, buffers, inputs equal to eager's in float64, on one",
        "rank and on two.",
        "",
        f"{carried} constructs are carried, {len(ROWS) - carried} refused by name and line.",
    ]
    for group, how in HOW.items():
        lines += ["", f"## {group}", "", f"{how[0].upper()}{how[1:]}.", ""]
        lines += ["| construct | |", "|---|---|"]
        lines += [f"| {row.name} | {_outcome(row)} |" for row in ROWS if row.group == group]
    return "\n".join(lines) + "\n"


def _outcome(row: Row) -> str:
    if row.refused:
        return f"refused: {row.why}"
    return "carried" if row.trains else "carried, without gradients"


if __name__ == "__main__":
    PAGE.write_text(page())
