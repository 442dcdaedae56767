"""Values for what has none: weights, buffers and inputs on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ringfx.torch_compat.pytree import tree_map

__all__ = ["draw_weights", "filled_inputs", "filled_model", "is_meta", "vocabulary"]

SMALLEST_VOCABULARY = 16
"""Tables with fewer rows hold token types, not words."""


def is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


def filled_model(model: nn.Module) -> tuple[str, ...]:
    """Gives a model on meta values on the CPU, in place; in words, what was invented.

    Modules with ``reset_parameters`` make their own values; weights are drawn anyway.
    """
    if not any(map(is_meta, (*model.parameters(), *model.buffers()))):
        return ()
    unset: list[str] = []
    for name, module in model.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if not any(map(is_meta, own)):
            continue
        buffers = [key for key, x in module.named_buffers(recurse=False) if is_meta(x)]
        module.to_empty(device="cpu", recurse=False)
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
            continue
        for key in buffers:
            _fill(getattr(module, key))
            unset.append(f"{name}.{key}".strip("."))
    draw_weights(model)
    listed = f" (buffers without values, filled with numbers: {', '.join(unset)})" if unset else ""
    return (f"weights drawn at random, since the model is on the meta device{listed}",)


def draw_weights(model: nn.Module) -> None:
    """Weights of unit gain, scales away from 1 and biases away from 0.

    The usual 0.02 makes attention so uniform that a wrong mask hides in the rounding, and biases of
    zero hide where they are added.
    """
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim >= 2:
                parameter.copy_(noise / max(parameter[0].numel(), 1) ** 0.5)
            else:
                parameter.copy_(torch.nan_to_num(parameter).clamp(-4, 4) + 0.1 * noise)


def filled_inputs(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Inputs on meta as values by their names: ids below the vocabulary, ones for masks, ..."""
    generator, words = torch.Generator().manual_seed(12), vocabulary(model)
    names = [*inspect.signature(model.forward).parameters]

    def fill(name: str, value: Any) -> Any:
        return tree_map(lambda x: _input(name, x, words, generator) if is_meta(x) else x, value)

    named = [names[i] if i < len(names) else "" for i in range(len(args))]
    return (
        tuple(fill(name, x) for name, x in zip(named, args, strict=True)),
        {name: fill(name, x) for name, x in kwargs.items()},
    )


def vocabulary(model: nn.Module) -> int:
    """How many words the model knows: rows of its smallest table that is no table of types."""
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    config = getattr(model, "config", None)
    words = getattr(config, "vocab_size", None)
    if isinstance(words, int):
        return words
    return min((n for n in tables if n >= SMALLEST_VOCABULARY), default=2)


def _input(name: str, x: torch.Tensor, words: int, generator: torch.Generator) -> torch.Tensor:
    shape, kind = x.shape, x.dtype
    if kind.is_floating_point or kind.is_complex:
        made = torch.randn(shape, generator=generator).to(kind)
    elif kind is torch.bool or "mask" in name:
        made = torch.ones(shape, dtype=kind)
    elif "position" in name:
        made = torch.arange(shape[-1]).expand(shape).to(kind).clone()
    elif "type" in name:
        made = torch.zeros(shape, dtype=kind)
    else:
        made = torch.randint(0, words, shape, generator=generator).to(kind)
    return made.requires_grad_(x.requires_grad)


def _fill(buffer: torch.Tensor) -> None:
    if buffer.is_floating_point():
        buffer.uniform_(generator=torch.Generator().manual_seed(13))
    elif buffer.dtype is torch.bool:
        buffer.fill_(True).tril_() if buffer.ndim >= 2 else buffer.fill_(True)
    elif buffer.ndim:
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    else:
        buffer.zero_()
