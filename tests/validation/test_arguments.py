"""Every public function refuses a wrong argument at once, in words of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ringfx
from ringfx.cost_model import load_profile
from ringfx.errors import RingfxError
from ringfx.report.detection_report import report_detection


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


x = torch.randn(1, 8, 32)
q = torch.randn(1, 2, 8, 4)
attend = ringfx.ops.ring_attention

# What a parameter must not be: of other types, out of range, not finite, of a kind that exists not.
COUNTS = (None, "2", 2.5, True, 0, -1, float("nan"), [2], (2,), torch.tensor(2.5))
NAMES = (3, "nope", "", ["production"], 2.0, object())
SWITCHES = ("no", 2.5, None, [True])
TENSORS = (None, 1.0, "q", [1.0], q.int(), q.bool(), q.to(torch.complex64), q.to_sparse())

BAD: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any], Mapping[str, tuple[Any, ...]]]] = {
    "optimize": (
        ringfx.optimize,
        {"model": Attend()},
        {
            "model": (None, 3, "model", Attend, torch.compile(Attend()), lambda y: y),
            "mesh": (3, "world", [0, 1]),
            "strategy": (*NAMES, {"*": "nope"}, {3: "production"}, None),
            "gpu_memory": ("many", "80 apples", -1, 0, 2.5, True, float("nan"), [1]),
            "profile": (3, "nope", "", 2.5, ["cpu-default"], "/nowhere/at/all.json"),
            "optimizer": (None, "nope", -1, 2.5, [1]),
            "compiler": (*NAMES, None),
            "outputs": (*NAMES, None),
            "on_unsupported": (*NAMES, None),
            "check_inputs": ("no", -1, 2.5, None, [1]),
            "strict": SWITCHES,
        },
    ),
    "plan": (
        ringfx.plan,
        {"model": Attend(), "args": (x,), "world_size": 2},
        {
            "model": (None, 3, "model", Attend, torch.compile(Attend()), lambda y: y),
            "args": (x, None, 3, "x", {"x": x}),
            "kwargs": (3, "x", [x], ({"x": x},), {3: x}),
            "world_size": (*COUNTS, np.float64(2.0)),
            "gpu_memory": ("many", -1, 0, 2.5, True, float("nan")),
            "profile": (3, "nope", 2.5),
            "optimizer": (None, "nope", -1, 2.5),
            "strategy": (*NAMES, {"*": "nope"}, None),
            "on_unsupported": (*NAMES, None),
            "strict": SWITCHES,
        },
    ),
    "explain": (
        report_detection,
        {"model": Attend(), "args": (x,)},
        {"model": (None, 3, Attend), "args": (x, None, 3), "kwargs": (3, [x])},
    ),
    "stats": (ringfx.stats, {"model": None}, {"model": (None, 3, Attend())}),
    "load_profile": (
        load_profile,
        {"name": "cpu-default", "device": "cpu"},
        {"name": (3, 2.5, "nope", [1]), "device": (3, None, "", ["cpu"])},
    ),
    "ring_attention": (
        attend,
        {"q": q, "k": q, "v": q},
        {
            "q": (*TENSORS, q[:, :, :0], q[:, :0], q[0], q.to("meta"), q.double()),
            "k": (*TENSORS, q[:, :, :0], q[:, :0], q[0], q.to("meta"), q.double(), q[..., :3]),
            "v": (*TENSORS, q[:, :, :0], q[:, :0], q[0], q.to("meta"), q.double(), q[:, :, :5]),
            "strategy": (*NAMES, None),
            "causal": SWITCHES,
            "scale": ("big", [1.0], float("nan"), float("inf"), True),
            "layout": (*NAMES, None),
            "length": ("8", 2.5, 0, -1, True, [8], 100),
            "kv_length": ("8", 2.5, 0, -1, True, [8], 100),
            "window": ("8", 2.5, 0, -1, True, [8]),
            "prefix": ("8", 2.5, -1, True, [8]),
            "documents": (3, "d", [1], torch.ones(8), torch.ones(3, dtype=torch.long)),
            "key_padding": (3, "d", [1], torch.ones(8), torch.ones(3, dtype=torch.bool)),
            "keep": (3, "k <= q", ("nope",), ("at", 7, ("k",))),
            "bias": (3, "k", ("nope",), ("at", 7, ("k",))),
            "inputs": (3, "x", [3], q),
            "soft_cap": ("big", 0.0, -1.0, float("nan"), True),
            "sinks": (3, "s", [1.0], torch.ones(3), torch.ones(2, dtype=torch.long)),
            "dropout": ("0.1", 0.1, 1.0, -0.5, True, None),
            "seed": ("1", 2.5, -1, True, torch.ones(1), torch.ones(2, dtype=torch.long)),
            "fully_masked": (*NAMES, None),
            "group": (3, "world", [0]),
            "name": (3, None, ["a"]),
        },
    ),
    "shard": (
        ringfx.ops.shard,
        {"x": q, "dim": 2},
        {
            "x": (None, 3, "x", [1.0]),
            "dim": ("2", None, 2.5, 9, -9, [2]),
            "layout": (*NAMES, None),
            "group": (3, "world", [0]),
        },
    ),
    "gather": (
        ringfx.ops.gather,
        {"x": q, "dim": 2},
        {
            "x": (None, 3, "x", [1.0]),
            "dim": ("2", None, 2.5, 9, -9, [2]),
            "length": ("8", 2.5, -1, [8], 100),
            "layout": (*NAMES, None),
            "group": (3, "world", [0]),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", BAD)
def test_a_wrong_argument_is_refused_at_once(function: str) -> None:
    call, good, parameters = BAD[function]
    accepted, wrong = [], []
    for parameter, values in parameters.items():
        for value in values:
            try:
                call(**{**good, parameter: value})
            except RingfxError:
                continue
            except Exception as error:  # what must not come through
                wrong.append(
                    (parameter, repr(value)[:60], f"{type(error).__name__}: {error}"[:120])
                )
            else:
                accepted.append((parameter, repr(value)[:60]))
    assert not wrong, wrong
    assert not accepted, accepted


def test_numbers_of_numpy_are_numbers() -> None:
    assert ringfx.plan(Attend(), (x,), world_size=np.int64(2)).world_size == 2  # type: ignore[arg-type]
