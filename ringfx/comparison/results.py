"""One forward and backward of a model, and everything of it that is compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ringfx.comparison.agreement import Results
from ringfx.split_tensor.tensor import SplitTensor
from ringfx.torch_compat.pytree import keystr, tree_map, tree_map_with_path

__all__ = ["GRADIENT_OF", "LOSS", "Loss", "cast", "distances", "kind_of", "one_step", "tensors"]

Loss = Callable[[Any], torch.Tensor]
"""What the model returns -> the number that is differentiated."""

GRADIENT_OF, BUFFER, LOSS = "gradient of ", "buffer ", "loss"
SEED = 1
"""Of what the model draws (dropout), and of the weights in ``projected``."""


def one_step(
    call: Callable[..., Any], owner: nn.Module, args: Any, kwargs: Any, loss: Loss | None = None
) -> Results:
    """A call and, where gradients are enabled and anything has one, its backward.

    Parameters
    ----------
    owner
        The module whose parameters and buffers are read afterwards.
    loss
        Default: the loss that the model returns, or a fixed random projection of its outputs.
    """
    owner.zero_grad(set_to_none=True)
    args, kwargs = tree_map(_fresh, (tuple(args), dict(kwargs)))
    torch.manual_seed(SEED)
    output = call(*args, **kwargs)
    outputs = tensors(output)
    value = loss(output) if loss is not None else _loss(output, outputs)
    trains = value is not None and value.requires_grad
    if value is not None and trains:
        value.backward()  # type: ignore[no-untyped-call]
    found = dict(outputs)
    if value is not None:
        found = {LOSS: value} | found
    units = {k: torch.finfo(x.dtype).eps for k, x in found.items() if x.is_floating_point()}
    results = {name: _plain(x) for name, x in found.items()}
    results |= {f"{BUFFER}{name}": _plain(x) for name, x in owner.named_buffers()}
    gradients = {name: p.grad for name, p in owner.named_parameters() if p.requires_grad}

    def note(path: Any, x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.requires_grad:
            gradients[f"input{keystr(path)}"] = x.grad
        return x

    tree_map_with_path(note, (args, kwargs))
    gradients = gradients if trains else {}
    kept = {f"{GRADIENT_OF}{k}": None if g is None else _plain(g) for k, g in gradients.items()}
    return Results(tensors={**results, **kept}, units=units)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Floating tensors among nested values in that type, and all of them on the CPU."""

    def one(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        kind = dtype if x.is_floating_point() else x.dtype
        return x.detach().to("cpu", kind).requires_grad_(x.requires_grad)

    return tree_map(one, values)


def tensors(value: Any, path: str = "output") -> dict[str, torch.Tensor]:
    """Every tensor of an output, through mappings, sequences and caches of transformers."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(i), v) for i, v in enumerate(value)]
    elif type(value).__module__.startswith("transformers.cache_utils"):
        items = [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, item in items:
        found |= tensors(item, f"{path}.{key}")
    return found


def kind_of(name: str) -> str:
    """``loss``, ``gradient``, ``buffer`` or ``output``."""
    if name == LOSS:
        return "loss"
    if name.startswith(GRADIENT_OF):
        return "gradient"
    return "buffer" if name.startswith(BUFFER) else "output"


def distances(ours: Results, exact: Results) -> dict[str, float]:
    """For each kind but buffers |t - t'| / |t'| of all its tensors together, by the 2-norm."""
    squares: dict[str, tuple[float, float]] = {}
    for name, true in exact.tensors.items():
        found = ours.tensors.get(name)
        if true is None or found is None or true.shape != found.shape or true.is_complex():
            continue
        if kind_of(name) == "buffer":
            continue
        kept = true.isfinite() & found.isfinite()
        off = float((found - true)[kept].square().sum())
        size = float(true[kept].square().sum())
        before = squares.get(kind_of(name), (0.0, 0.0))
        squares[kind_of(name)] = before[0] + off, before[1] + size
    return {kind: math.sqrt(a / b) if b else 0.0 for kind, (a, b) in squares.items()}


def _fresh(value: Any) -> Any:
    """A copy: a gradient, or a write, of one run is not seen by the next."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    return value.detach().clone().requires_grad_(value.requires_grad)


def _loss(output: Any, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    given = output.get(LOSS) if isinstance(output, Mapping) else getattr(output, LOSS, None)
    if isinstance(given, torch.Tensor) and given.numel() == 1:
        return given
    floating = [x for x in outputs.values() if x.is_floating_point() and x.requires_grad]
    if len(floating) == 1 and floating[0].numel() == 1:
        return floating[0]
    terms = [projected(x) for x in floating]
    return sum(terms[1:], terms[0]) if terms else None


def projected(x: torch.Tensor) -> torch.Tensor:
    """A number in which every element counts differently, about 1 for elements about 1."""
    generator = torch.Generator().manual_seed(SEED)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    return (x * weights).square().mean() + (x * weights).mean()


def _plain(value: torch.Tensor) -> torch.Tensor:
    """An ordinary copy in float64, whatever tensor subclass the value was."""
    with torch.no_grad():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        copied = value.detach().clone()
        if isinstance(copied, SplitTensor):  # a copy of a split output is split
            copied = copied.whole()
        return copied.to(torch.complex128 if copied.is_complex() else torch.float64)
