"""A model run where nothing has storage: on fake tensors of any size, in Dynamo or as it is."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from ringfx.comm.state_ranks import ONE_RANK, StateRanks
from ringfx.compile.dynamo import compiled
from ringfx.compile.given_values import GivenMode
from ringfx.compile.optimized import Optimized
from ringfx.compile.states import in_param_dtype
from ringfx.compile.trained import leaves_of_graph
from ringfx.errors import CaptureRefused, RingfxError
from ringfx.passes.capture.trace import keep_value
from ringfx.torch_compat.dynamo import BackendCompilerFailed, TorchDynamoException
from ringfx.torch_compat.fake_tensors import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    as_fake,
)
from ringfx.torch_compat.pytree import keystr, tree_leaves, tree_map_with_path
from ringfx.torch_compat.releases import ISOLATED

__all__ = ["PlanMade", "trace", "trained"]


_WITH_VALUES = 'Do: give inputs with their values, such as torch.tensor(values, device="cpu").'


class PlanMade(Exception):
    """Stops the model once its plan is made."""


def trace(
    model: torch.nn.Module, args: Any, kwargs: Any, backend: Any, states: StateRanks = ONE_RANK
) -> tuple[str, ...]:
    """Run the model on fake tensors; returns notes, such as where it could not continue.

    Programs that the process has compiled stay. Programs traced here have a backend of their own
    and are freed with the model's fake copy.
    """
    model = model._ringfx_inner if isinstance(model, Optimized) else model
    mode = _mode_of(model, args, kwargs)
    notes = mode.notes if isinstance(mode, GivenMode) else {}
    fake_model, fake_args, fake_kwargs = _as_fake(mode, model, args, kwargs)
    in_param_dtype(fake_model, states)
    if not ISOLATED:
        torch.compiler.reset()
    traced = compiled(fake_model, backend)
    try:
        with mode:
            traced(*fake_args, **fake_kwargs)  # type: ignore[no-untyped-call]
    except BackendCompilerFailed as failure:
        if not isinstance(failure.inner_exception, PlanMade):
            raise
    except RingfxError as error:
        for note in notes:
            error.add_note(f"{note}. {_WITH_VALUES}")
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as unknown:
        return (
            *notes,
            "planning stopped where the model's Python code reads tensor values "
            f"({unknown.func}); the plan does not contain the code after that",
        )
    except TorchDynamoException as failure:
        _refuse_untraceable(mode, fake_model, fake_args, fake_kwargs, failure)
        raise
    finally:
        if not ISOLATED:
            torch.compiler.reset()
    return tuple(notes)


def _refuse_untraceable(
    mode: FakeTensorMode, model: torch.nn.Module, args: Any, kwargs: Any, failure: Exception
) -> None:
    """Says so where Dynamo fails on the model without ringfx too.

    Raises
    ------
    CaptureRefused
        With Dynamo's reason.
    """
    plain = torch.compile(model, backend=lambda gm, inputs: gm.forward, dynamic=False, **ISOLATED)
    try:
        with mode:
            plain(*args, **kwargs)  # type: ignore[no-untyped-call]
    except TorchDynamoException as alone:
        lines = [line for line in str(alone).strip().splitlines() if line.strip()]
        reason = lines[0] if lines else type(alone).__name__
        where = next((x.strip() for x in reversed(lines) if x.strip().startswith("File ")), "")
        raise CaptureRefused(
            f"torch.compile cannot trace this model, with or without ringfx: {reason}"
            + (f" ({where})" if where else "")
            + (
                ". Do: make torch.compile(model, backend='eager') work first; Dynamo's full "
                "report is attached as the cause of this error."
            )
        ) from failure
    except Exception:  # of the model's own code: what failed first is said
        return


def trained(model: torch.nn.Module, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The parameters that a call gives gradients to, by the graph of a run on fake tensors.

    Where that run cannot be made, none: tracing then says what there is to say.
    """
    model = model._ringfx_inner if isinstance(model, Optimized) else model
    leaves = tree_leaves((args, kwargs))
    if not all(x is None or isinstance(x, torch.Tensor | int | float | str) for x in leaves):
        return []  # an object, such as a cache, that the run would change
    mode = _mode_of(model, args, kwargs)
    fake_model, fake_args, fake_kwargs = _as_fake(mode, model, args, kwargs)
    try:
        with mode:
            results = fake_model(*fake_args, **fake_kwargs)
    except Exception:  # of the model's own code, or a value that it reads
        return []
    own = {id(x) for x in fake_model.parameters()}
    return [x for x in leaves_of_graph(results) if id(x) in own]


def _tensors(model: torch.nn.Module, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    leaves = tree_leaves((args, kwargs))
    yield from (x for x in leaves if isinstance(x, torch.Tensor))


def _mode_of(model: torch.nn.Module, args: Any, kwargs: Any) -> FakeTensorMode:
    for tensor in _tensors(model, args, kwargs):
        if isinstance(tensor, FakeTensor):
            mode: FakeTensorMode = tensor.fake_mode
            return mode
    return GivenMode()


def _as_fake(mode: FakeTensorMode, model: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    """Model and inputs in one fake mode; ``meta`` tensors become fake CPU ones.

    Values that are there are kept beside the fake tensors, for what reads them.
    """

    def fake(x: Any, name: str) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
            return x
        if x.device.type != "meta":
            twin = as_fake(mode, x)
            if isinstance(mode, GivenMode):
                mode.give(twin, x)
            return twin
        with mode:
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
        if isinstance(mode, GivenMode):
            mode.assume(made, name)
        return made

    memo: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        twin = fake(tensor, f"the model's {name}")
        if type(tensor) is torch.Tensor and tensor.device.type != "meta":
            keep_value(twin, tensor)
        if isinstance(tensor, torch.nn.Parameter) and not isinstance(twin, torch.nn.Parameter):
            twin = torch.nn.Parameter(twin, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = twin
    twin_model = copy.deepcopy(model, memo)

    names = [*inspect.signature(model.forward).parameters]

    def named(path: Any, x: Any) -> Any:
        place = getattr(path[1], "idx", None)
        if place is not None and path[0].idx == 0 and place < len(names):
            return fake(x, names[place])
        return fake(x, keystr(path[1:]))

    return twin_model, *tree_map_with_path(named, (args, kwargs))
