"""What the command line is pointed at: a factory, or a Hugging Face configuration.

Finding and importing happen before fake mode, since a module may hold tensors of its own; building
the model and its inputs happens inside it, so that an 8B model takes no memory.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import nn

from ringfx.errors import InvalidArgument
from ringfx.validation.fields import STRICT, Name
from ringfx.validation.json_reader import Source, parse_json, validated
from ringfx.validation.names import nearest
from ringfx.validation.text_files import is_there, read_text

__all__ = ["Inputs", "Target", "build", "find_table", "find_target", "floating_dtype"]

_NAME_A_FILE = "Do: name one that is there; a relative path starts where the command runs."


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs to invent where the factory gives none."""

    seq_len: int | None
    """None where nobody says: then the factory must have inputs of its own."""
    is_asked: bool = True
    """Someone asked for this length; else a factory's own default goes before it."""
    batch_size: int = 1
    labels: bool = True
    """Give labels too where ``forward`` takes them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Target:
    """A model with the inputs of one call."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    has_own_length: bool = False
    """The inputs are the factory's own; it does not take a length."""
    is_invented: bool = False
    """The inputs are zeros, made up for a factory that gives none."""


def find_target(text: str, *, hf: bool = False, dtype: str | None = None) -> Callable[..., Any]:
    """The factory that a text names, imported but not called.

    Parameters
    ----------
    text
        ``MODULE:FACTORY``, ``path/to/file.py:FACTORY``, a ``config.json`` or its folder; with
        ``hf`` the name of a transformers configuration class.
    dtype
        Floating type of the parameters, as torch names it; None: the model's own choice.

    Raises
    ------
    InvalidArgument
        There is no such module, attribute, file or class; the text says which and what to do.
    """
    kind = floating_dtype(dtype)
    path = Path(text)
    if hf and path.suffix != ".json" and not _is_folder(path):
        return _of_config(_hf_class_config(text), kind, text)
    if path.suffix == ".json" or (_is_folder(path) and ":" not in text):
        return _of_config(_hf_file_config(path), kind, text)
    return _in_dtype(_import_factory(text), kind)


def find_table(option: str, text: str) -> Any:
    """The mapping that ``MODULE:NAME`` or ``path/to/file.py:NAME`` names; its user checks it.

    Raises
    ------
    InvalidArgument
        There is no such module, file or name.
    """
    where, _, name = text.rpartition(":")
    if not where or not name:
        raise InvalidArgument(
            f"{option} {text!r} names no table. Do: give MODULE:NAME or path/to/file.py:NAME."
        )
    return _attribute(where, name, f"name the mapping that {option} takes")


def build(factory: Callable[..., Any], inputs: Inputs, name: str) -> Target:
    """Call the factory and complete its answer with inputs; run it under ``api.offline()``.

    Raises
    ------
    InvalidArgument
        The factory failed, gave no module, or the module's inputs cannot be invented.
    """
    _refuse_no_length(factory, inputs, name)
    with _blame(name):
        made = factory(**_accepted(factory, inputs))
    if _is_hf_config(made):
        with _blame(name):
            made = _hf_factory(made, None)()
    target = _target(made, inputs, name)
    is_told = "seq_len" in _parameters(factory)
    return replace(target, has_own_length=isinstance(made, tuple) and not is_told)


def _is_folder(path: Path) -> bool:
    return is_there(path) and path.is_dir()


# --- finding ----------------------------------------------------------------------------------


def _import_factory(text: str) -> Callable[..., Any]:
    where, _, attribute = text.rpartition(":")
    if not where or not attribute:
        raise InvalidArgument(
            f"{text!r} names no factory. Do: give MODULE:FACTORY, such as mymodel:make, a"
            " config.json, or --hf with a configuration class."
        )
    factory = _attribute(where, attribute, "name a function that makes the model")
    if isinstance(factory, nn.Module) or _is_hf_config(factory):
        made = factory
        return lambda: made
    if not callable(factory):
        raise InvalidArgument(
            f"{text} is a {type(factory).__name__}, not a function that makes the model. Do: name "
            "a function, a class or a module, such as mymodel:make."
        )
    return _as_function(factory)


def _attribute(where: str, attribute: str, remedy: str) -> Any:
    """What a module holds under a name, which may have dots."""
    found: Any = _import(where)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InvalidArgument(
                f"module {where!r} has no attribute {attribute!r}."
                f"{nearest(part, dir(found))} Do: {remedy}."
            )
        found = getattr(found, part)
    return found


def _as_function(factory: Any) -> Callable[..., Any]:
    result: Callable[..., Any] = factory
    return result


def _import(where: str) -> ModuleType:
    if where.endswith(".py"):
        return _import_file(Path(where))
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with _blame(f"importing {where}", passing=ModuleNotFoundError):
            return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(error.name + ".")):
            raise InvalidArgument(
                f"there is no module {where!r} (looked in {Path.cwd()} and the Python path)."
                " Do: run from the folder that holds it, or give path/to/file.py:FACTORY."
            ) from error
        raise InvalidArgument(
            f"importing {where} needs the module {error.name!r}, which is not installed. Do: "
            "install what holds it, or run from the folder that does."
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not is_there(path):
        raise InvalidArgument(f"there is no file {path}. {_NAME_A_FILE}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    with _blame(f"importing {path}"):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _blame(name: str, passing: type[Exception] = InvalidArgument) -> Iterator[None]:
    """Turn an error in the user's code into one line that says what and where."""
    try:
        yield
    except (InvalidArgument, passing):
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}:{frame.lineno}"
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        raise InvalidArgument(
            f"{name} failed with {_causes(error)} ({where})."
            " Do: mend it there; a plan builds models on the meta device, without values."
        ) from error


def _causes(error: BaseException) -> str:
    """An error in a line, and the one that it was raised from at first: transformers says of a
    module only that it cannot be imported."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    texts = (f"{type(x).__name__}: {str(x).strip().split(chr(10))[0]}" for x in (error, first))
    return ", caused by ".join(dict.fromkeys(texts))


# --- Hugging Face -----------------------------------------------------------------------------


def _transformers() -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise InvalidArgument(
            "this needs transformers, which is not installed."
            " Do: pip install transformers, or give MODULE:FACTORY."
        ) from error


def _hf_class_config(name: str) -> Any:
    transformers = _transformers()
    config_class = getattr(transformers, name, None)
    if not (isinstance(config_class, type) and hasattr(config_class, "model_type")):
        raise InvalidArgument(
            f"transformers has no configuration class {name!r}.{nearest(name, dir(transformers))}"
            " Do: name one such as LlamaConfig, or give a config.json."
        )
    return config_class()


def _hf_file_config(path: Path) -> Any:
    file = path / "config.json" if _is_folder(path) else path
    if not is_there(file):
        raise InvalidArgument(f"there is no file {file}. {_NAME_A_FILE}")
    source = Source(
        where=str(file),
        damaged=f"{file} is no Hugging Face configuration",
        error=InvalidArgument,
        remedy="give the config.json that save_pretrained wrote",
    )
    fields = parse_json(read_text(file), source)
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise InvalidArgument(
            f'{file} is not a Hugging Face configuration: it has no "model_type". Do: give the '
            "config.json of a transformers model, or a factory, MODULE:FACTORY."
        )
    named = {name: fields[name] for name in ("model_type", "architectures") if name in fields}
    validated(_ConfigNames, named, source)
    transformers = _transformers()
    with _blame(f"reading {file}"):
        return transformers.AutoConfig.for_model(**fields)


@dataclass(frozen=True, kw_only=True)
class _ConfigNames:
    """What ringfx itself reads of a configuration; transformers checks the rest."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model_type: Name
    architectures: tuple[Name, ...] | None = None


def _is_hf_config(value: object) -> bool:
    return hasattr(value, "model_type") and hasattr(value, "to_dict") and not callable(value)


def _of_config(config: Any, dtype: torch.dtype | None, name: str) -> Callable[[], nn.Module]:
    with _blame(name):
        return _hf_factory(config, dtype)


def _hf_factory(config: Any, dtype: torch.dtype | None) -> Callable[[], nn.Module]:
    """Make the config's model; its modelling module is imported now, outside fake mode."""
    model_class = _hf_model_class(config)
    kind = dtype or getattr(config, "dtype", None)
    chosen = {} if kind is None else {"dtype": kind}

    def make() -> nn.Module:
        model: nn.Module = model_class._from_config(config, **chosen)
        return model

    return make


def _hf_model_class(config: Any) -> Any:
    """The class that the config names, else the causal language model of its type."""
    transformers = _transformers()
    for architecture in getattr(config, "architectures", None) or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise InvalidArgument(
        f"transformers has no model for {type(config).__name__}. Do: give a factory that makes it, "
        "MODULE:FACTORY."
    )


# --- building ---------------------------------------------------------------------------------


def floating_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name; InvalidArgument where it is none, or not of floating point."""
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidArgument(
            f"{name!r} is not a floating dtype. Do: give float32, bfloat16, float16 or float64."
        )
    return dtype


def _in_dtype(factory: Callable[..., Any], dtype: torch.dtype | None) -> Callable[..., Any]:
    """The factory under another default dtype; fake parameters cannot be converted afterwards."""
    if dtype is None:
        return factory

    @functools.wraps(factory)
    def make(**kwargs: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return factory(**kwargs)
        finally:
            torch.set_default_dtype(before)

    return make


def _refuse_no_length(factory: Callable[..., Any], inputs: Inputs, name: str) -> None:
    asked = _parameters(factory).get("seq_len")
    if inputs.seq_len is None and asked is not None and asked.default is asked.empty:
        raise InvalidArgument(f"{name} takes seq_len. Do: give --seq-len.")


def _accepted(factory: Callable[..., Any], inputs: Inputs) -> dict[str, Any]:
    """The sizes that the factory has parameters for."""
    offered = {"seq_len": inputs.seq_len, "batch_size": inputs.batch_size}
    known = _parameters(factory)
    if "seq_len" in known and not inputs.is_asked:
        own = known["seq_len"].default
        offered["seq_len"] = inputs.seq_len if own in (inspect.Parameter.empty, None) else None
    return {name: value for name, value in offered.items() if name in known and value is not None}


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _target(made: Any, inputs: Inputs, name: str) -> Target:
    if isinstance(made, nn.Module):
        return Target(model=made, kwargs=_invented(made, inputs, name), is_invented=True)
    if isinstance(made, tuple) and 2 <= len(made) <= 3 and isinstance(made[0], nn.Module):
        args = made[1] if isinstance(made[1], tuple | list) else None
        kwargs = made[2] if len(made) == 3 else {}
        if args is not None and isinstance(kwargs, Mapping):
            _check_call(made[0], args, kwargs, name)
            return Target(model=made[0], args=tuple(args), kwargs=kwargs)
    raise InvalidArgument(
        f"{name} gave {_described(made)}. Do: return a torch.nn.Module,"
        " a tuple (model, args) or (model, args, kwargs), or a Hugging Face configuration."
    )


def _check_call(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], name: str
) -> None:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InvalidArgument(
            f"{name}: its inputs do not fit {type(model).__name__}.forward: {error}. Do: return "
            f"inputs that model(*args, **kwargs) takes: {_forward(model)}."
        ) from error


def _forward(model: nn.Module) -> str:
    """``forward`` with the names of its parameters."""
    return f"forward({', '.join(_parameters(model.forward))})"


def _described(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return "None" if value is None else f"a {type(value).__name__}"


def _invented(model: nn.Module, inputs: Inputs, name: str) -> dict[str, Any]:
    """Token ids, and labels where they are wanted; nothing else can be made up."""
    parameters = _parameters(model.forward)
    needed = [
        p.name
        for p in parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if "input_ids" not in parameters or set(needed) - {"input_ids"}:
        wanted = ", ".join(needed or parameters)
        raise InvalidArgument(
            f"{name}: ringfx can generate input_ids and labels only, not the inputs of "
            f"{type(model).__name__}.forward({wanted}). Do: let the factory return (model, args, "
            "kwargs); it may take seq_len and batch_size."
        )
    if inputs.seq_len is None:
        raise InvalidArgument(
            f"{name} has no inputs of its own. Do: give --seq-len, or let the factory return "
            "(model, args) or (model, args, kwargs)."
        )
    made = {"input_ids": torch.zeros(inputs.batch_size, inputs.seq_len, dtype=torch.int64)}
    if inputs.labels and "labels" in parameters:
        made["labels"] = torch.zeros_like(made["input_ids"])
    return made
