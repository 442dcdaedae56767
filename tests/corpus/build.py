"""A tiny model from a row, with weights under which every parameter and every mask matters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
import transformers
from torch import nn

from ringfx.comparison.results import tensors
from tests.corpus.row import Row, Variant

__all__ = ["build", "draw", "has_experts", "hidden_size", "total"]

_DROPOUTS = ("dropout", "pdrop", "drop_rate", "drop_path", "layerdrop", "dropout_prob", "attn_drop")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(variant: Variant) -> nn.Module:
    """The variant's model; the same weights in every process."""
    torch.manual_seed(7)
    row = variant.row
    family = getattr(transformers, row.model)
    tokens = _special_tokens(family.config_class, row.config)
    config = family.config_class(**{**tokens, **row.config})
    _without_dropout(config)
    how = {"attn_implementation": variant.attention}
    if row.experts is not None:
        how["experts_implementation"] = row.experts
    model: nn.Module = family._from_config(config, **how)
    if variant.dtype == "float64" and row.experts is None and has_experts(model):
        model.set_experts_implementation("eager")  # grouped products know no float64
    model = model.to(getattr(torch, variant.dtype))
    draw(model)
    return model.train(row.train)


def has_experts(model: nn.Module) -> TypeGuard[transformers.PreTrainedModel]:
    return isinstance(model, transformers.PreTrainedModel) and (
        model._can_set_experts_implementation()
    )


def _special_tokens(config_class: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The real ones lie beyond a tiny vocabulary."""
    known = inspect.signature(config_class.__init__).parameters
    return dict(SPECIAL) if "vocab_size" in known or "vocab_size" in given else {}


def _without_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            _without_dropout(value)
        elif isinstance(value, float) and any(word in name for word in _DROPOUTS):
            setattr(config, name, 0.0)


def draw(model: nn.Module) -> None:
    """Weights of unit gain, biases and scales away from 0 and 1.

    The usual 0.02 makes attention so uniform that a wrong mask or scale hides in the rounding, and
    biases of zero hide where they are added.
    """
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.ndim >= 2:
                parameter.copy_(noise / max(parameter[0].numel(), 1) ** 0.5)
            else:
                parameter.copy_(torch.nan_to_num(parameter).clamp(-4, 4) + 0.1 * noise)


def total(output: Any) -> torch.Tensor:
    """The output's own loss, or one in which every element of every output counts differently."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        assert isinstance(loss, torch.Tensor)
        return loss
    floating = [x for x in tensors(output).values() if x.is_floating_point() and x.requires_grad]
    loss = floating[0].new_zeros(())
    for x in floating:
        weights = torch.arange(x.numel(), dtype=x.dtype).view(x.shape).cos()
        loss = loss + (x * weights).square().mean() + (x * weights).mean()
    return loss


def hidden_size(row: Row) -> int:
    """Numbers that one token's hidden state holds, the smallest of the model's towers."""
    names = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim")
    sizes = [v for k, v in row.config.items() if k in names and isinstance(v, int)]
    for value in row.config.values():
        if isinstance(value, Mapping):
            sizes += [v for k, v in value.items() if k in names and isinstance(v, int)]
    return min(sizes, default=32)
