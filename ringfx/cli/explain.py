"""``ringfx explain``: build the model on fake tensors and print what detection makes of it."""

from __future__ import annotations

import torch
from rich.console import Console

from ringfx import api
from ringfx.cli.model_target import Inputs, build, find_target
from ringfx.cli.tables import rules_of
from ringfx.cost_model import parse_tokens
from ringfx.report.detection_report import report_detection

__all__ = ["run"]

TOKENS = "4k"
"""Where neither the command nor the factory says: what is found does not depend on it."""


def run(
    target: str,
    *,
    seq_len: str | None,
    batch_size: int,
    train: bool,
    dtype: str | None,
    hf: bool,
    strict: bool,
    as_json: bool,
    rules: str | None = None,
) -> None:
    """Print the explanation.

    Raises
    ------
    RingfxError
        Whatever is wrong with the request or the model; with ``strict``, a missed attention.
    """
    inputs = Inputs(
        seq_len=parse_tokens(TOKENS if seq_len is None else seq_len), is_asked=seq_len is not None,
        batch_size=batch_size, labels=train,
    )  # fmt: skip
    with Console(stderr=True).status(f"reading {target}"):
        factory = find_target(target, hf=hf, dtype=dtype)
        with api.offline():
            made = build(factory, inputs, target)
            made.model.train(train)
        with torch.set_grad_enabled(train):
            found = report_detection(
                made.model, made.args, dict(made.kwargs), strict=strict, rules=rules_of(rules)
            )
    if as_json:
        print(found.to_json())
    else:
        Console().print(found)
