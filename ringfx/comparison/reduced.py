"""A model and its inputs made small: fewer layers, fewer tokens, and narrower if it must be.

What is kept is every kind of layer (class, shapes, and numbers that it was made with), so that each
line of the model's code still runs. A Hugging Face model is built anew from its configuration, with
weights drawn at random; of any other model layers are taken out, and its weights stay.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ringfx.comparison.filled import draw_weights, filled_inputs, filled_model, vocabulary
from ringfx.torch_compat.pytree import tree_leaves, tree_map

__all__ = ["LONGEST", "Reduced", "reduced"]

LONGEST = 250
"""Tokens; neither 3 nor 4 ranks share them equally."""
MOST_PARAMETERS = 30_000_000
"""Above it a model that has a configuration gets narrower: as many as two cores step in seconds."""
FEWEST_LAYERS = 2
"""Of one kind: the second takes what the first gave."""
FACTORS = (2, 4, 8, 16, 32)
WIDTHS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "d_model",
    "d_ff", "ffn_dim", "dim", "hidden_dim", "n_embd", "n_inner", "n_head", "n_heads", "num_heads",
    "embed_dim", "encoder_ffn_dim", "decoder_ffn_dim", "encoder_attention_heads",
    "decoder_attention_heads", "attention_heads", "moe_intermediate_size",
    "shared_expert_intermediate_size", "word_embed_proj_dim", "ffn_hidden_size",
)  # fmt: skip
"""Fields of configurations that are divided together; the width of a head stays."""
VOCABULARY, WINDOW = 512, 64
WINDOWS = ("sliding_window", "attention_window", "attention_chunk_size", "window_size")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """A small model with its inputs."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    notes: tuple[str, ...]
    """What was reduced, in words."""


def reduced(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reduced:
    """A small model of the same kinds of layers; the given one is not changed.

    What does not run when it is reduced (a list whose length the model's code counts on, a length
    that it needs) stays as it was.
    """
    for is_cut in (True, False):
        small, notes = _small(model, _cuts(model) if is_cut else [])
        notes += filled_model(small)
        given = _known_words(small, *filled_inputs(small, args, kwargs))
        short, told = _short(*given)
        if told and _runs(small, *short):
            return Reduced(model=small, args=short[0], kwargs=short[1], notes=(*notes, *told))
        if is_cut and not _runs(small, *given):
            continue  # the layers are counted on
        if told:
            notes += ("its length stays: the model does not run with a shorter one",)
        break
    return Reduced(model=small, args=given[0], kwargs=given[1], notes=notes)


def _small(model: nn.Module, cuts: list[_Cut]) -> tuple[nn.Module, tuple[str, ...]]:
    build = _builder(model)
    if build is not None:
        return _built_anew(model, build, cuts)
    dropped = (x for cut in cuts for i, x in enumerate(cut.layers) if i not in cut.kept)
    small = copy.deepcopy(model, {id(x): nn.Identity() for x in dropped})
    return small, _cut_all(small, cuts)


# --- depth ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Cut:
    path: str
    layers: nn.ModuleList
    kept: tuple[int, ...]


def _cuts(model: nn.Module) -> list[_Cut]:
    """The outermost lists with more layers of a kind than are needed; experts lie in a layer."""
    found: list[_Cut] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{cut.path}.") for cut in found)
        if not isinstance(module, nn.ModuleList) or inside:
            continue
        kept = _kept(module)
        if len(kept) < len(module):
            found.append(_Cut(path=path, layers=module, kept=kept))
    return found


def _kept(layers: nn.ModuleList) -> tuple[int, ...]:
    """One layer of each kind, and at least two in all: the first that there are."""
    kinds: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        kinds.setdefault(_kind(layer), []).append(i)
    each = 1 if len(kinds) > 1 else FEWEST_LAYERS
    return tuple(sorted(i for found in kinds.values() for i in found[:each]))


def _kind(layer: nn.Module) -> Any:
    """Equal for layers that run the same code on the same shapes."""
    return tuple(
        (
            name,
            type(part),
            tuple((n, tuple(p.shape), p.dtype) for n, p in part.named_parameters(recurse=False)),
            tuple((n, tuple(b.shape), b.dtype) for n, b in part.named_buffers(recurse=False)),
            tuple(_told(part)),
        )
        for name, part in layer.named_modules()
    )


def _told(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """Numbers and words that a module was made with, but for its own place in the list."""
    for name, value in vars(part).items():
        if isinstance(value, bool | int | str) and not _is_place(name) and name != "training":
            yield name, value


def _is_place(name: str) -> bool:
    return name in ("layer_idx", "layer_id", "idx", "index", "layer_number", "i", "block_idx")


def _cut_all(model: nn.Module, cuts: list[_Cut]) -> tuple[str, ...]:
    notes = []
    for cut in cuts:
        layers = model.get_submodule(cut.path)
        kept = nn.ModuleList(layers[i] for i in cut.kept)  # type: ignore[index]
        parent = model.get_submodule(cut.path.rpartition(".")[0])
        setattr(parent, cut.path.rpartition(".")[2], kept)
        for place, (before, layer) in enumerate(zip(cut.kept, kept, strict=True)):
            _renumber(layer, before, place)
        _tell_config(model, cut)
        which = ", ".join(map(str, cut.kept))
        notes.append(f"{cut.path}: {len(cut.layers)} layers -> {len(kept)} (numbers {which})")
    return tuple(notes)


def _renumber(layer: nn.Module, before: int, now: int) -> None:
    for part in layer.modules():
        for name, value in list(vars(part).items()):
            if _is_place(name) and value == before and not isinstance(value, bool):
                setattr(part, name, now)


def _tell_config(model: nn.Module, cut: _Cut) -> None:
    """Fields of a configuration that say something of each layer."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == len(cut.layers):
                setattr(config, name, [value[i] for i in cut.kept])
        if getattr(config, "num_hidden_layers", None) == len(cut.layers):
            config.num_hidden_layers = len(cut.kept)


# --- widths -----------------------------------------------------------------------------------


def _builder(model: nn.Module) -> Callable[[Any], nn.Module] | None:
    """How a model with a configuration is built anew; none of transformers' own are others."""
    make = getattr(type(model), "_from_config", None)
    config = getattr(model, "config", None)
    if make is None or not hasattr(config, "to_dict"):
        return None

    def build(config: Any) -> nn.Module:
        made: nn.Module = make(copy.deepcopy(config))
        return made.train(model.training)

    return build


def _built_anew(
    model: nn.Module, build: Callable[[Any], nn.Module], cuts: list[_Cut]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Narrower until what is left after the cuts is small."""
    narrow: Any = copy.deepcopy(model.config)
    notes: tuple[str, ...] = ()
    if hasattr(narrow, "dtype"):
        narrow.dtype = torch.float32
    windows = _with_small_windows(narrow)
    for factor in (1, *FACTORS):
        trial = _narrowed(narrow, factor) if factor > 1 else (narrow, ())
        if trial is None:
            break
        try:
            with torch.device("meta"):
                shape = build(trial[0])
        except Exception:  # sizes that do not fit each other: what was found before is kept
            break
        narrow_now, notes = trial
        if _parameters(shape, cuts) <= MOST_PARAMETERS:
            break
    small = build(narrow_now)
    cut = _cut_all(small, cuts)
    draw_weights(small)
    widths = (", ".join(notes),) if notes else ()
    return small, (*cut, *windows, *widths, "weights drawn at random")


def _parameters(model: nn.Module, cuts: list[_Cut]) -> int:
    """Of the model once its layers are cut."""
    dropped = sum(
        p.numel()
        for cut in cuts
        for i in range(len(cut.layers))
        if i not in cut.kept
        for p in model.get_submodule(f"{cut.path}.{i}").parameters()
    )
    return sum(p.numel() for p in model.parameters()) - dropped


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _configs(value)


def _narrowed(config: Any, factor: int) -> tuple[Any, tuple[str, ...]] | None:
    """Widths and numbers of heads divided by a factor, a small vocabulary; None if they do not
    divide."""
    narrow, notes = copy.deepcopy(config), []
    for part in _configs(narrow):
        for name in WIDTHS:
            value = vars(part).get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 1:
                continue
            if name == "num_key_value_heads" and value < factor:
                new = 1
            elif value % factor:
                return None
            else:
                new = value // factor
            setattr(part, name, new)
            notes.append(f"{name} {value} -> {new}")
        words = vars(part).get("vocab_size")
        if isinstance(words, int) and words > VOCABULARY:
            part.vocab_size = VOCABULARY
            notes.append(f"vocab_size {words} -> {VOCABULARY}")
            for number, name in enumerate(TOKENS):
                if isinstance(vars(part).get(name), int | list):
                    setattr(part, name, number)
    return narrow, tuple(dict.fromkeys(notes))


def _with_small_windows(config: Any) -> tuple[str, ...]:
    """A window longer than the tokens that are left would hide nothing."""
    notes = []
    for part in _configs(config):
        for name in WINDOWS:
            value = vars(part).get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > LONGEST:
                setattr(part, name, WINDOW)
                notes.append(f"{name} {value} -> {WINDOW}")
    return tuple(dict.fromkeys(notes))


# --- length -----------------------------------------------------------------------------------


def _short(args: Any, kwargs: Any) -> tuple[tuple[Any, Any], tuple[str, ...]]:
    """Inputs with every long dimension but the batch cut; integers alone where there are any."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    words = [x for x in given if not x.is_floating_point() and x.ndim]
    lengths = {n for x in words or given for n in x.shape[min(1, x.ndim - 1) :] if n > LONGEST}
    if not words:  # the last dimension of numbers is their width
        lengths = {n for x in given if x.ndim > 2 for n in x.shape[1:-1] if n > LONGEST}

    def cut(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        index = tuple(
            slice(LONGEST) if n in lengths and (i or x.ndim == 1) else slice(None)
            for i, n in enumerate(x.shape)
        )
        return x.detach()[index].clone().requires_grad_(x.requires_grad)

    notes = tuple(f"{n:,} tokens -> {LONGEST}" for n in sorted(lengths))
    return tree_map(cut, (args, dict(kwargs))), notes


def _runs(model: nn.Module, args: Any, kwargs: Any) -> bool:
    try:
        with torch.no_grad():
            copy.deepcopy(model)(*args, **copy.deepcopy(kwargs))
    except Exception:  # whatever the model's code says to a length that it cannot take
        return False
    return True


def _known_words(model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Ids of a larger vocabulary as ids of this one."""
    words = vocabulary(model)
    names = [*inspect.signature(model.forward).parameters]

    def known(name: str, x: Any) -> Any:
        is_ids = ("input_ids" in name or "labels" in name) and isinstance(x, torch.Tensor)
        if not is_ids or x.is_floating_point() or int(x.max()) < words:
            return x
        return torch.where(x >= words, x % words, x)

    named = [names[i] if i < len(names) else "" for i in range(len(args))]
    return (
        tuple(known(name, x) for name, x in zip(named, args, strict=True)),
        {name: known(name, x) for name, x in kwargs.items()},
    )
