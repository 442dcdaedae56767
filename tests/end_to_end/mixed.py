"""How far a split model is from float64, beside how far the unsplit model is by the same recipe.

A recipe says how a model is called: under autocast, wrapped as accelerate does, backward inside or
outside. The oracle is the same model and recipe on float64 weights, which autocast leaves alone.
What is compared: every floating output, the loss and the gradient of every parameter. With d the
2-norm of a difference from the oracle,

    d(split)  <=  2 * d(unsplit) + EPS / 4 * max(norm of the oracle, floor * L)

where L is the largest norm of its kind (gradients, outputs) and EPS the distance of two numbers of
the narrow type (twice that for a single number): how one rounding more falls out is chance. Whole
models are 1 % off, which is 5 times that.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

import ringfx
from ringfx.split_tensor.tensor import SplitTensor
from tests.support.ranks import RankPool

__all__ = ["Mixed", "ambient", "check", "excesses", "leave_as_is"]

Recipe: TypeAlias = Callable[[nn.Module, Mapping[str, Any]], tuple[Any, torch.Tensor]]
ALLOWED = 2.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Mixed:
    """One model, how it is called, and what it is asked for; everything importable."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Any]]
    recipe: Recipe
    weights: torch.dtype = torch.float32
    eps: float = 2**-7
    """Of the narrow type of the recipe."""
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1
    label: str = ""
    sites: int | None = None
    """Attentions that must be found and split."""
    floor: float = 1e-3
    """Size of a tensor, beside the largest of its kind, below which it is all rounding."""


def leave_as_is(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
    output = model(**inputs)
    loss = loss_of(output)
    loss.backward()
    return output, loss


def forward_alone(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
    """Flex attention has no backward on a CPU."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
        return output, loss_of(output)


def ambient(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
    """Forward and loss under autocast, as every guide has it."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
        loss = loss_of(output)
    loss.backward()
    return output, loss


def by_state(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
    """Autocast set without a context, and no cache of cast weights."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_dtype("cpu", torch.bfloat16)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_cache_enabled(False)
    try:
        output = model(**inputs)
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.set_autocast_cache_enabled(before)
    loss = loss_of(output)
    loss.backward()
    return output, loss


def in_float16(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
    """With a scaled loss, as GradScaler has it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.float16):
        output = model(**inputs)
        loss = loss_of(output)
    scaler.scale(loss).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler.unscale_(optimizer)
    return output, loss


def backward_inside(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        output = model(**inputs)
        loss = loss_of(output)
        loss.backward()
    return output, loss


def converted(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
    """What accelerate makes of ``model.forward``: autocast around it, results in float32."""

    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    given = model.forward
    inside = torch.autocast("cpu", torch.bfloat16)(functools.partial(type(model).forward, model))

    def forward(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, wide, inside(*args, **kwargs))

    model.forward = forward
    try:
        output = model(**inputs)
        loss = loss_of(output)
        loss.backward()
    finally:
        model.forward = given
    return output, loss


def loss_of(output: Any) -> torch.Tensor:
    found = getattr(output, "loss", None)
    if found is not None:
        assert isinstance(found, torch.Tensor)
        return found
    tensor = output if isinstance(output, torch.Tensor) else output[0]
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return wide.sin().square().mean()  # of one sign: a sum that cancels is all rounding


def check(pool: RankPool, cases: Sequence[Mixed]) -> None:
    """Every case on every rank."""
    problems = []
    for rank, found in enumerate(pool.run(excesses_of, tuple(cases))):
        for case, (excess, sites) in zip(cases, found, strict=True):
            where = f"rank {rank} of {pool.num_ranks}, {case.label}"
            problems += [f"{where}: {name} {ratio:.2f}" for name, ratio in excess.items()]
            if case.sites is not None and sites != case.sites:
                problems.append(f"{where}: {sites} attentions are split")
    assert not problems, "\n".join(problems)


def excesses_of(cases: Sequence[Mixed]) -> list[tuple[dict[str, float], int]]:
    return [excesses(case) for case in cases]


def excesses(case: Mixed) -> tuple[dict[str, float], int]:
    """What is further from float64 than allowed, and how many attentions were split."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = case.model().to(case.weights)
    exact, ours = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    optimized = ringfx.optimize(ours, **{"compiler": "eager"} | dict(case.options))
    try:
        wanted = _results(case, exact, exact, torch.float64)
        near = _results(case, stock, stock, case.weights)
        found = _results(case, optimized, ours, case.weights)
    except Exception as error:
        error.add_note(f"in case {case.label}")
        raise
    assert wanted.keys() == near.keys() == found.keys(), (wanted.keys() ^ found.keys(), case.label)
    sites = len(optimized.plan.layers) if isinstance(optimized.plan, ringfx.Plan) else 0
    return _excess(case, wanted, near, found), sites


def _excess(
    case: Mixed,
    wanted: Mapping[str, torch.Tensor],
    near: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    largest: dict[str, float] = {}
    for name, value in wanted.items():
        kind = name.split(" ")[0]
        largest[kind] = max(largest.get(kind, 0.0), float(value.norm()))
    excess = {}
    for name, value in wanted.items():
        chance = case.eps / (4 if value.numel() > 1 else 2)
        floor = chance * max(float(value.norm()), case.floor * largest[name.split(" ")[0]])
        assert found[name].dtype == near[name].dtype, (case.label, name, found[name].dtype)
        allowed = ALLOWED * float((near[name].double() - value).norm()) + floor
        ratio = float((found[name].double() - value).norm()) / max(allowed, 1e-300)
        if not ratio <= 1.0:
            excess[name] = ratio
    return excess


def _results(
    case: Mixed, call: nn.Module, owner: nn.Module, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    for _ in range(case.steps):
        owner.zero_grad(set_to_none=True)
        inputs = pytree.tree_map_only(torch.Tensor, lambda x: _cast(x, dtype), dict(case.inputs()))
        output, loss = case.recipe(call, inputs)
    found = {"loss": _plain(loss)}
    for path, value in pytree.tree_leaves_with_path(output):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            found[f"output {pytree.keystr(path)}"] = _plain(value)
    for name, parameter in owner.named_parameters():
        if parameter.grad is not None:
            found[f"gradient {name}"] = _plain(parameter.grad)
    return found


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _plain(value: torch.Tensor) -> torch.Tensor:
    copied = value.detach()
    if isinstance(copied, SplitTensor):
        copied = copied.whole()
    return copied.clone()
