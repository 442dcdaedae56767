"""``ringfx.verify``: a user's own model, split over ranks of this machine, against itself."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ringfx.api import Optimized, check_call
from ringfx.comm.local_ranks import LocalRanks, can_inherit
from ringfx.comparison.agreement import TOLERANCE, Exact, Results
from ringfx.comparison.filled import filled_inputs, filled_model
from ringfx.comparison.on_ranks import Found, Handed, Task, alone, check, find, handed
from ringfx.comparison.points import record
from ringfx.comparison.reduced import Reduced, reduced
from ringfx.comparison.report import FirstDifference, Narrow, Tensor, Verification, Worst
from ringfx.comparison.results import Loss, cast, distances, kind_of, one_step
from ringfx.compile.settings import Settings
from ringfx.errors import InvalidArgument
from ringfx.units.argument import Argument
from ringfx.units.format import format_bytes
from ringfx.validation.arguments import switch, whole_number
from ringfx.validation.names import named_arguments, unknown_option

__all__ = ["refuse_too_large", "verify"]

MOST_RANKS_HERE = 64
KINDS = ("loss", "output", "gradient", "buffer")
COLLECTIVE_TIMEOUT_S = 600.0
SEARCHES_FROM = 1e-9
"""A value within the model that differs by less than this of its size was only rounded."""


@named_arguments
def verify(
    model: nn.Module,
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    world_size: int = 2,
    loss: Loss | None = None,
    reduce: bool = False,
    narrow: torch.dtype | None = torch.bfloat16,
    says: Callable[[str], None] | None = None,
    **options: Any,
) -> Verification:
    """Whether the model gives split over ranks what it gives unsplit, tried on this machine's CPU.

    The model runs in float64, once whole and once over ``world_size`` processes, and its outputs,
    its loss, and the gradient of every parameter and input are compared on every rank. Where
    something differs, it runs once more and the layer that differs first is named. The given model
    is not changed. Each rank holds a copy in float64: pass ``reduce=True`` for a large model.

    Parameters
    ----------
    args, kwargs
        The inputs of one call. Tensors on the meta device are given values.
    world_size
        Ranks to start.
    loss
        What the model returns -> the number that is differentiated. Default: the loss that the
        model returns; else a fixed random projection of its outputs.
    reduce
        Compare a small model of the same code: a layer of each kind, 250 tokens, and narrower if it
        is still large and has a Hugging Face configuration. The report says what was reduced.
    narrow
        A type of which the distance from float64 is reported too, split and unsplit; None: of none.
    says
        Called with what is done now.
    options
        Those of ``ringfx.optimize``, but for ``mesh``, with ``compiler="aot_eager"`` by default:
        what ringfx rewrites is compared, in seconds. ``"inductor"`` compares its programs too.

    Raises
    ------
    InvalidArgument
        An argument cannot be used, the unsplit model fails, or it needs more memory than there is.
    CommunicationError
        A rank failed: the text is its whole traceback.
    RingfxError
        Whatever ``ringfx.optimize`` refuses in this model.
    """
    started, says = time.monotonic(), says or _nothing
    _refuse_import_by_rank()
    check_call("verify", model, args, kwargs)
    world_size = whole_number("verify", "world_size", world_size, most=MOST_RANKS_HERE)
    _check_comparison(loss, reduce, narrow)
    options = _checked(options)
    if isinstance(model, Optimized):
        model = model._ringfx_inner
    asked = _Asked(loss=loss, narrow=narrow, options=options, world_size=world_size, says=says)
    with (
        torch.random.fork_rng(devices=[]),
        tempfile.TemporaryDirectory(prefix="ringfx-verify-") as folder,
    ):
        torch.manual_seed(0)
        says("making the model small" if reduce else "copying the model")
        small = _copied(model, args, kwargs or {}, reduce)
        refuse_too_large(small.model, world_size, reduce)
        compared = _compared(small, asked, Path(folder))
        different = compared.different
        notes = compared.notes
        if compared.drops:
            with_dropout = _with_dropout(compared.task, asked, Path(folder))
            small.model.eval()
            compared = _compared(small, asked, Path(folder))
            different = (*compared.different, *with_dropout)
            notes = (*compared.notes, _DROPS)
    return Verification(
        model=type(model).__name__,
        world_size=world_size,
        dtype=compared.task.dtype,
        compiler=str(options["compiler"]),
        tolerance=TOLERANCE[compared.task.dtype],
        worst=compared.worst,
        different=different,
        first=compared.first,
        narrow=compared.narrow,
        reduced=small.notes,
        notes=notes,
        strategies=compared.strategies,
        seconds=time.monotonic() - started,
    )


_DROPS = (
    "attention drops weights by other numbers than torch draws: compared with the unsplit model in "
    "evaluation mode, and with dropout against the same model on one rank"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Asked:
    """What is compared, and how."""

    loss: Loss | None
    narrow: torch.dtype | None
    options: Mapping[str, Any]
    world_size: int
    says: Callable[[str], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Compared:
    """What came of one model in one mode."""

    task: Task
    worst: tuple[Worst, ...]
    different: tuple[Tensor, ...]
    first: FirstDifference | None
    narrow: Narrow | None
    notes: tuple[str, ...]
    strategies: tuple[str, ...]
    drops: bool


def _compared(small: Reduced, asked: _Asked, folder: Path) -> _Compared:
    stock, narrowed = _unsplit(small, asked.loss, asked.narrow, asked.says)
    task = Task(
        model=stock.model, args=stock.args, kwargs=stock.kwargs, options=asked.options,
        loss=asked.loss, trains=torch.is_grad_enabled(), dtype=stock.dtype,
        narrow=None if narrowed is None else _name(asked.narrow), stock=stock.results,
        exact=stock.exact,
    )  # fmt: skip
    found, first, notes = _on_ranks(task, asked, folder)
    return _Compared(
        task=task,
        worst=_worst(found, TOLERANCE[stock.dtype]),
        different=_different(found),
        first=first,
        narrow=_narrow(asked.narrow, narrowed, found),
        notes=(*stock.notes, *notes),
        strategies=found[0].strategies,
        drops=any(x.drops for x in found),
    )


def _with_dropout(task: Task, asked: _Asked, folder: Path) -> tuple[Tensor, ...]:
    """What differs between many ranks and one, where both draw alike."""
    inherit = can_inherit()
    where = None if inherit else folder
    asked.says("running the model with dropout on one rank")
    output = folder / "ranks.txt"
    with handed(task, where) as given, LocalRanks(1, output=output, inherit=inherit) as ranks:
        (one,) = ranks.run(alone, given)
    asked.says(f"running the model with dropout over {asked.world_size} ranks")
    with (
        handed(
            replace(task, stock=one, exact=_less_rounding(one, task), narrow=None), where
        ) as given,
        LocalRanks(asked.world_size, output=output, inherit=inherit) as ranks,
    ):
        found = _different(ranks.run(check, given))
    return tuple(replace(x, name=f"with dropout, {x.name}") for x in found)


def _less_rounding(one: Results, task: Task) -> Results | None:
    """What one rank gave, less what roundings to float32 did to the unsplit model's: of that size
    are those of this run too, though by other numbers."""
    if task.exact is None:
        return None
    found: dict[str, torch.Tensor | None] = {}
    for name, value in one.tensors.items():
        rounded, exact = task.stock.tensors.get(name), task.exact.tensors.get(name)
        if value is not None and rounded is not None and exact is not None:
            value = value - (rounded - exact) if value.shape == exact.shape else value
        found[name] = value
    return replace(one, tensors=found)


def _nothing(_: str) -> None:
    """Nobody listens."""


def _check_comparison(loss: object, reduce: object, narrow: object) -> None:
    switch("verify", "reduce", reduce)
    if loss is not None and not callable(loss):
        raise InvalidArgument(
            f"verify: loss is {loss!r}. Do: pass a function of what the model returns, or None."
        )
    floats = isinstance(narrow, torch.dtype) and narrow.is_floating_point
    if narrow is not None and not floats:
        raise InvalidArgument(
            f"verify: narrow is {narrow!r}. "
            "Do: pass a floating type such as torch.bfloat16, or None."
        )


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for the ranks, refused here rather than on each of them."""
    given = {"compiler": "aot_eager", **options}
    if "mesh" in given:
        raise InvalidArgument("verify starts its own ranks. Do: pass world_size in place of mesh.")
    own = inspect.signature(verify).parameters.values()
    known = [p.name for p in own if p.kind is p.KEYWORD_ONLY] + [f.name for f in fields(Settings)]
    for name in given:
        if name not in known:
            raise unknown_option(name, known)
    Settings.of(given)
    if given.get("outputs", "global") != "global":
        raise InvalidArgument(
            "verify compares outputs of the global shape. Do: leave "
            f"{Argument('outputs', 'local')} out; the program is the same."
        )
    if not isinstance(given.get("shard_states", False), bool):
        raise InvalidArgument(
            "verify starts ranks that share one sequence. Do: pass "
            f"{Argument('shard_states', True)}; a mesh of more ranks cannot be tried here."
        )
    return given


def _refuse_import_by_rank() -> None:
    """A script without its guard is imported by each rank that it starts, which would start more.

    While a process that was spawned imports it, the script is ``__mp_main__`` and not yet main.
    """
    is_main = sys.modules.get("__mp_main__") is sys.modules.get("__main__")
    if multiprocessing.parent_process() is not None and not is_main:
        raise InvalidArgument(
            "verify was called while a rank imports this script. Do: put the call under "
            '`if __name__ == "__main__":`.'
        )


def _copied(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], reduce: bool
) -> Reduced:
    if reduce:
        return reduced(model, args, kwargs)
    copied = copy.deepcopy(model)
    notes = filled_model(copied)
    args, kwargs = filled_inputs(copied, args, kwargs)
    return Reduced(model=copied, args=args, kwargs=kwargs, notes=notes)


def refuse_too_large(model: nn.Module, world_size: int, is_reduced: bool) -> None:
    """Weights and gradients in float64, here and on each rank."""
    numbers = sum(p.numel() for p in model.parameters())
    needed = 8 * 2 * numbers * (world_size + 1)
    there = _memory()
    if there is not None and needed > there:
        raise InvalidArgument(
            f"verify would hold {numbers:,} parameters and their gradients in float64 in "
            f"{world_size + 1} processes: {format_bytes(needed)}, but this machine has "
            f"{format_bytes(there)}. Do: "
            + (
                "pass a narrower model of the same code; only one with a Hugging Face "
                "configuration is made narrower by itself."
                if is_reduced
                else f"pass {Argument('reduce', True)}, or a smaller model of the same code."
            )
        )


def _memory() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# --- the unsplit model ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class _Stock:
    """The unsplit model in the type in which it is compared."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: str
    results: Results
    exact: Results | None
    notes: tuple[str, ...]


def _unsplit(
    small: Reduced, loss: Loss | None, narrow: torch.dtype | None, says: Callable[[str], None]
) -> tuple[_Stock, Mapping[str, float] | None]:
    """What the unsplit model gives, in float64 where it runs so, and in the narrow type."""
    says("running the unsplit model in float64")
    notes: tuple[str, ...] = ()
    dtype, exact = "float64", None
    try:
        model, args, kwargs, results = _ran(small, torch.float64, loss)
        exact = _exact(small, loss)
    except Exception as error:  # of the model's own code: an operator that knows no float64
        says("running the unsplit model in float32")
        dtype = "float32"
        model, args, kwargs, results = _ran_or_refused(small, loss, error)
        notes = (f"compared in float32: in float64 the unsplit model fails ({_line(error)})",)
    stock = _Stock(
        model=model, args=args, kwargs=kwargs, dtype=dtype, results=results, exact=exact,
        notes=notes,
    )  # fmt: skip
    if narrow is None:
        return stock, None
    says(f"running the unsplit model in {_name(narrow)}")
    try:
        return stock, distances(_ran(small, narrow, loss)[3], exact or results)
    except Exception as error:  # likewise
        note = f"{_name(narrow)} is not compared: in it the unsplit model fails ({_line(error)})"
        return _Stock(**{**vars(stock), "notes": (*notes, note)}), None


def _ran(
    small: Reduced, dtype: torch.dtype, loss: Loss | None
) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any], Results]:
    model = copy.deepcopy(small.model).to("cpu", dtype)
    args, kwargs = cast((small.args, dict(small.kwargs)), dtype)
    return model, args, kwargs, one_step(copied := copy.deepcopy(model), copied, args, kwargs, loss)


def _ran_or_refused(
    small: Reduced, loss: Loss | None, first: Exception
) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any], Results]:
    try:
        return _ran(small, torch.float32, loss)
    except Exception as error:
        raise InvalidArgument(
            f"verify: the unsplit model itself fails on these inputs, on the CPU: {_line(error)}. "
            "Do: make model(*args, **kwargs) and its backward work first; the original error is "
            "attached as the cause."
        ) from error


def _exact(small: Reduced, loss: Loss | None) -> Results:
    """Without the roundings to float32 that the model's code asks for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Exact():
            return _ran(small, torch.float64, loss)[3]
    finally:
        torch.set_default_dtype(before)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    said = (str(error).strip() or "no text").splitlines()[0]
    return f"{type(error).__name__}: {said}"


# --- the ranks --------------------------------------------------------------------------------


def _on_ranks(
    task: Task, asked: _Asked, folder: Path
) -> tuple[list[Found], FirstDifference | None, tuple[str, ...]]:
    inherit = can_inherit()
    with (
        handed(task, None if inherit else folder) as given,
        LocalRanks(
            asked.world_size,
            collective_timeout_s=COLLECTIVE_TIMEOUT_S,
            output=folder / "ranks.txt",
            inherit=inherit,
        ) as ranks,
    ):
        asked.says(f"running the model split over {asked.world_size} ranks")
        found: list[Found] = ranks.run(check, given)
        if not any(x.wrong for x in found) or any(x.drops for x in found):
            return found, None, ()
        asked.says("looking for the first layer that differs")
        return found, *_first(task, given, ranks, folder)


def _first(
    task: Task, given: Handed, ranks: LocalRanks, folder: Path
) -> tuple[FirstDifference | None, tuple[str, ...]]:
    """Where it differs first, by the rank that finds it earliest; or why that is not known."""
    model = copy.deepcopy(task.model)
    recorded = record(model, task.args, task.kwargs, task.loss)
    with handed(recorded, folder) as points:
        answers = ranks.run(find, given, points, _tolerance(task))
    places = [(x.order, rank, x) for rank, (_, x) in enumerate(answers) if x is not None]
    if places:
        order, rank, place = min(places, key=lambda item: item[:2])
        direction = "forward" if order < len(recorded.forward) else "backward"
        return FirstDifference(
            layer=place.layer, what=place.what, direction=direction, rank=rank
        ), ()
    if not any(found.wrong for found, _ in answers):
        levers = "without a compiler, chunks, recompute and offload"
        return None, (f"{levers} the split model agrees: one of them makes the difference",)
    return None, ("no value within the model differs: what follows its last module does",)


def _tolerance(task: Task) -> float:
    """For values within the model: some hundred times what its own rounding leaves."""
    if task.exact is None:
        return 1e-4 if task.dtype == "float32" else SEARCHES_FROM
    rounding = max(distances(task.stock, task.exact).values(), default=0.0)
    return max(SEARCHES_FROM, min(1e-4, 100 * rounding))


# --- the answer -------------------------------------------------------------------------------


def _worst(found: Sequence[Found], tolerance: float) -> tuple[Worst, ...]:
    """For each kind the tensor that differs most."""
    largest = {
        name: max(x.differences.get(name, 0.0) for x in found) for name in found[0].differences
    }
    wrong = {name for x in found for name in x.wrong}
    kinds = {kind: [name for name in largest if kind_of(name) == kind] for kind in KINDS}
    worst = {kind: max(names, key=largest.__getitem__) for kind, names in kinds.items() if names}
    return tuple(
        Worst(
            kind=kind, count=len(kinds[kind]), found=largest[name], name=name,
            is_rounding=largest[name] > tolerance and name not in wrong,
        )
        for kind, name in worst.items()
    )  # fmt: skip


def _different(found: Sequence[Found]) -> tuple[Tensor, ...]:
    """The largest difference first."""
    ranks: dict[str, Tensor] = {}
    for rank, one in enumerate(found):
        for name in one.wrong:
            value = one.differences[name]
            if name not in ranks or value > ranks[name].found:
                ranks[name] = Tensor(name=name, found=value, rank=rank)
    return tuple(sorted(ranks.values(), key=lambda x: -x.found))


def _narrow(
    dtype: torch.dtype | None, unsplit: Mapping[str, float] | None, found: Sequence[Found]
) -> Narrow | None:
    """Of the rank that is furthest."""
    if unsplit is None:
        return None
    split = {kind: max(x.narrow.get(kind, 0.0) for x in found) for kind in unsplit}
    return Narrow(dtype=_name(dtype), unsplit=unsplit, split=split)
