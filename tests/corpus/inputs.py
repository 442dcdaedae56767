"""Inputs of the models, drawn from fixed seeds; each recipe returns a factory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch

from tests.corpus.row import Inputs

__all__ = [
    "both", "features", "frames", "illustrated", "images", "packed", "padded", "seq2seq", "tokens",
    "waves",
]  # fmt: skip

Tensor = torch.Tensor
P = ParamSpec("P")
VOCAB = 96
FIRST = 5
"""Smaller ids mean padding, begin and end to some models."""


def recipe(function: Callable[P, dict[str, Any]]) -> Callable[P, Inputs]:
    def made(*args: P.args, **kwargs: P.kwargs) -> Inputs:
        return functools.partial(function, *args, **kwargs)

    return made


def _ids(batch: int, length: int, vocab: int = VOCAB, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST, vocab, (batch, length), generator=generator)


def _noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _padding(batch: int, length: int, left: bool) -> Tensor:
    """1 where a token counts; row r loses r/3 of its tokens at one end."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        lost = row * length // 3
        mask[row, slice(None, lost) if left else slice(length - lost, None)] = 0
    return mask


@recipe
def tokens(
    length: int = 61, batch: int = 2, vocab: int = VOCAB, labels: bool = True
) -> dict[str, Any]:
    """Token ids, all of them real."""
    ids = _ids(batch, length, vocab)
    return {"input_ids": ids} | ({"labels": ids} if labels else {})


@recipe
def padded(
    length: int = 61, batch: int = 2, left: bool = False, labels: bool = True
) -> dict[str, Any]:
    """Rows of different lengths under an attention mask; padding carries no label."""
    mask = _padding(batch, length, left)
    ids = _ids(batch, length)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask} | (
        {"labels": ids.masked_fill(mask == 0, -100)} if labels else {}
    )


@recipe
def packed(*lengths: int) -> dict[str, Any]:
    """Documents one after another in a row, told apart by positions that start again at 0."""
    ids = _ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


@recipe
def seq2seq(
    source: int = 61,
    target: int = 37,
    batch: int = 2,
    padding: bool = True,
    vocab: int = VOCAB,
) -> dict[str, Any]:
    """Source tokens, padded, and target tokens that are the labels as well."""
    mask = _padding(batch, source, left=False)
    given = {"attention_mask": mask} if padding else {}
    ids = _ids(batch, source, vocab)
    ids = ids.masked_fill(mask == 0, 0) if padding else ids
    target_ids = _ids(batch, target, vocab, seed=4)
    return {"input_ids": ids, "decoder_input_ids": target_ids, "labels": target_ids} | given


@recipe
def images(size: int = 30, batch: int = 2, channels: int = 3, width: int = 0) -> dict[str, Any]:
    return {"pixel_values": _noise(batch, channels, size, width or size)}


@recipe
def features(
    name: str, *shape: int, target: int = 0, batch: int = 2, mask: str = ""
) -> dict[str, Any]:
    """Spectra or other floating-point input, with decoder tokens where ``target`` is given."""
    given: dict[str, Any] = {name: _noise(batch, *shape)}
    if target:
        ids = _ids(batch, target, seed=4)
        given |= {"decoder_input_ids": ids, "labels": ids}
    if mask:
        given[mask] = _padding(batch, shape[0], left=False)
    return given


@recipe
def frames(count: int = 4, size: int = 16, batch: int = 2, channels: int = 3) -> dict[str, Any]:
    return {"pixel_values": _noise(batch, count, channels, size, size)}


@recipe
def waves(samples: int = 1230, batch: int = 2, padding: bool = False) -> dict[str, Any]:
    given: dict[str, Any] = {"input_values": _noise(batch, samples)}
    if padding:
        given["attention_mask"] = _padding(batch, samples, left=False)
    return given


@recipe
def illustrated(
    patches: int, token: int = 90, length: int = 61, size: int = 30, prefix: int = 0
) -> dict[str, Any]:
    """Text in which the first places of each row stand for the patches of its image.

    The first ``prefix`` tokens, if any, are of another type than the others.
    """
    ids = _ids(2, length, token)
    ids[:, 1 : patches + 1] = token
    types = (torch.arange(length) >= prefix).long().expand(2, -1)
    given = {"token_type_ids": types} if prefix else {}
    return {"input_ids": ids, "labels": ids, "pixel_values": _noise(2, 3, size, size)} | given


@recipe
def both(length: int = 13, size: int = 30, batch: int = 2) -> dict[str, Any]:
    """Text and an image for each row."""
    return {
        "input_ids": _ids(batch, length),
        "attention_mask": _padding(batch, length, left=False),
        "pixel_values": _noise(batch, 3, size, size),
    }
