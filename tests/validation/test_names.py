"""A misspelled or missing argument of a public function is refused with what there is."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import ringfx
from ringfx.errors import InvalidArgument

LAYER: Any = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
X = torch.randn(1, 8, 16)
OPTIMIZE: Any = ringfx.optimize
PLAN: Any = ringfx.plan
VERIFY: Any = ringfx.verify


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: OPTIMIZE(LAYER, starategy="x"), "unknown option 'starategy'. Did you mean"),
        (lambda: OPTIMIZE(LAYER, nope=1), "unknown option 'nope'. Do: use one of mesh, strategy"),
        (lambda: PLAN(LAYER, (X,), wordl_size=2), "'wordl_size'. Did you mean 'world_size'?"),
        (lambda: VERIFY(LAYER, X, wordl_size=2), "'wordl_size'. Did you mean 'world_size'?"),
        (
            lambda: PLAN(LAYER, (X,)),
            "plan: missing a required argument: 'world_size'. Do: call ringfx.plan(model, args=(),"
            " kwargs=None, world_size=..., OPTION=...)",
        ),
        (
            lambda: OPTIMIZE(LAYER, "ulysses"),
            "optimize: too many positional arguments. Do: call ringfx.optimize(model, OPTION=...)",
        ),
        (
            lambda: PLAN(LAYER, world_size=2),
            "plan: TransformerEncoderLayer.forward: missing a required argument: 'src'. Do: give",
        ),
        (
            lambda: VERIFY(LAYER, X, kwargs={"y": X}),
            "verify: TransformerEncoderLayer.forward: got an unexpected keyword argument 'y'",
        ),
        (lambda: OPTIMIZE(), "optimize: missing a required argument: 'model'. Do: call"),
        (lambda: ringfx.set_verbosity(), "set_verbosity: missing a required argument: 'level'"),  # type: ignore[call-arg]
    ],
)
def test_a_call_that_does_not_fit_is_refused_as_others_are(call: Any, text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        call()
    assert text in str(refused.value)


def test_verify_lists_no_option_that_it_refuses() -> None:
    with pytest.raises(InvalidArgument) as refused:
        VERIFY(LAYER, X, nope=1)
    listed = str(refused.value).split("use one of ")[1].rstrip(".").split(", ")
    assert {"world_size", "reduce", "strategy"} <= set(listed)
    assert "mesh" not in listed


def test_functions_keep_their_signatures() -> None:
    assert [*inspect.signature(ringfx.plan).parameters][:4] == [
        "model", "args", "kwargs", "world_size"
    ]  # fmt: skip
    assert str(ringfx.optimize.__doc__).startswith("The same model")
