"""The model that ``optimize`` returns: two objects that share one state.

The *outer* model is what users hold. Its class is made for it, ``Optimized`` in front of the
model's own class, and every way to run it (a call, ``forward``, a part of it called by itself)
leads to ``_run``. The *inner* module is what Dynamo traces: an object of the model's own class, so
that nothing of ringfx stands in the program. Both have one ``__dict__``: what is set on the outer
model (a parameter, a hook, a patched ``forward``) is there when the inner module runs.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.nn import ModuleDict, ModuleList
from torch.nn.parallel import DistributedDataParallel

from ringfx.comm.autograd_function import uncompiled
from ringfx.comm.state_ranks import ONE_RANK, StateRanks
from ringfx.comm.world import World
from ringfx.compile.backend import Backend
from ringfx.compile.dynamo import compiled_call
from ringfx.compile.fully_sharded import carry_state
from ringfx.compile.settings import Settings
from ringfx.compile.states import StandIns, cast_inputs, in_rows, shard_states
from ringfx.compile.uncompiled_reads import gathered_on_read
from ringfx.compile.why_unsplit import why_unsplit
from ringfx.errors import CaptureRefused, RingfxError
from ringfx.failures.describe import describe_error
from ringfx.failures.watchdog import start_watching
from ringfx.ir.plan import Plan
from ringfx.split_tensor.sharded_states import read_uncompiled
from ringfx.torch_compat.autograd import in_transform
from ringfx.torch_compat.graphs import children_of, has_hooks, hooks_of_all
from ringfx.torch_compat.operators import read_no_memory

__all__ = ["Optimized", "around", "optimized"]

M = TypeVar("M", bound=torch.nn.Module)

_SAVED = (
    "an optimized model is pickled as the model that was given to ringfx.optimize: after loading "
    "it runs unsharded. Do: call ringfx.optimize again after loading; or save "
    "model.state_dict(), which is the same with and without ringfx."
)

_COMPILED = (
    "model.compile() has no effect on an optimized model: ringfx compiles the model at its first "
    "call. Do: remove this call; choose the compiler with ringfx.optimize(model, compiler=...)."
)


class _Shared:
    """Shared by the outer model and its parts: the options, and the backend that compiles."""

    def __init__(self, settings: Settings, mesh: Any, states: StateRanks = ONE_RANK) -> None:
        self.settings = settings
        self.mesh = mesh
        self.states = states
        self._backend: Backend | None = None
        self.stand_ins = StandIns()

    @property
    def backend(self) -> Backend:
        """The one of the last call."""
        if self._backend is None:
            raise RingfxError(
                "this model has not run yet, and its plan depends on the shapes of its inputs. "
                "Do: call the model once, or use ringfx.plan(model, args, world_size=...)."
            )
        return self._backend

    def backend_now(self) -> Backend:
        """For the ranks that there are now: the process group may be made after ``optimize``."""
        if self._backend is not None and self._backend.is_running:
            return self._backend
        world = World.of(self.mesh)
        if self._backend is None or self._backend.world != world:
            self._backend = Backend(self.settings, world, states=self.states)
        return self._backend


class Optimized:
    """What ``optimize`` adds to a model's class; parameters, names and methods are the model's."""

    __slots__ = (
        "_ringfx_inner",
        "_ringfx_is_part",
        "_ringfx_parts",
        "_ringfx_programs",
        "_ringfx_shared"
    )  # fmt: skip

    _ringfx_shared: _Shared
    _ringfx_inner: torch.nn.Module
    """Of the model's own class, with the ``__dict__`` of this one."""
    _ringfx_programs: tuple[Any, Callable[..., Any]] | None
    """The compiled call, and what it was made for."""
    _ringfx_parts: dict[str, Optimized]
    """Outer models of submodules that have been asked for."""
    _ringfx_is_part: bool
    """Whether it is one of those: it may hold no attention."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """``type(model)(config)``: a new model of the class that was given, not optimized."""
        return _given_class(cls)(*args, **kwargs)

    @property
    def plan(self) -> Plan:
        """The plan of the last call.

        Raises
        ------
        RingfxError
            Before the first call: the plan depends on the inputs' shapes.
        """
        return self._ringfx_shared.backend.plan_of_last_call()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Hold gradients back while accumulating, as DistributedDataParallel's ``no_sync``.

        Calls made inside sum no gradients over the ranks; the backward of the first call outside
        sums all of them at once. ``zero_grad`` clears what is held back::

            with model.no_sync():
                for batch in batches[:-1]:
                    model(**batch).loss.backward()
            model(**batches[-1]).loss.backward()
        """
        outer = getattr(super(), "no_sync", contextlib.nullcontext)
        with outer(), self._ringfx_shared.backend_now().accumulation.no_sync():
            yield

    @uncompiled("ringfx compiles an optimized model itself")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, args, kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """``nn.Module.load_state_dict``; of whole tensors, sharded states take their rows."""
        if self._ringfx_shared.states.ranks > 1:
            state_dict = in_rows(cast(torch.nn.Module, self), state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``nn.Module.compile``: there is nothing left to do, which is said once."""
        self._ringfx_shared.backend_now().announce(_COMPILED)

    def __getattr__(self, name: str) -> Any:
        """What the module's dict does not hold; a part that may attend has an outer model."""
        value = super().__getattr__(name)  # type: ignore[misc]
        if _is_part(value) and not _is_running(self):
            return _part(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """``model.a = model.a``: the module itself is kept, not its outer model."""
        inner = value._ringfx_inner if isinstance(value, Optimized) else value
        super().__setattr__(name, inner)
        if name == "__class__":  # fully_shard puts a class of its own in front
            carry_state(cast(torch.nn.Module, self), self._ringfx_inner)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _make_outer(copy.deepcopy(self._ringfx_inner, memo), _anew(self))

    def __copy__(self) -> Any:
        return _make_outer(copy.copy(self._ringfx_inner), _anew(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled (``torch.save``) as the model that was given: the split one has no file form."""
        self._ringfx_shared.backend_now().announce(_SAVED)
        reduced: Any = self._ringfx_inner.__reduce_ex__(protocol)
        made, arguments, *rest = reduced
        if made is copyreg.__newobj__:  # type: ignore[attr-defined]  # only for objects of the class itself
            made, arguments = copyreg._reconstructor, (*arguments, object, None)  # type: ignore[attr-defined]
        return made, arguments, *rest


def optimized(model: M, settings: Settings, mesh: Any) -> M:
    """An outer model with the same parameters; the given model is not changed."""
    if isinstance(model, Optimized):  # optimized again: with the new options
        model = cast(M, model._ringfx_inner)
    _start_watching(mesh)
    states = ONE_RANK
    if settings.shard_states is not False:
        states = shard_states(model, World.of(mesh), settings.shard_states, settings.mp_policy)
    inner, shared = _twin(type(model), dict(model.__dict__)), _Shared(settings, mesh, states)
    carry_state(model, inner)
    if isinstance(inner, DistributedDataParallel):  # it runs its inner model itself
        inside = _twin(type(inner.module), dict(inner.module.__dict__))
        carry_state(inner.module, inside)
        inner.__dict__["_modules"] = {**children_of(inner), "module": _make_outer(inside, shared)}
    return _make_outer(inner, shared)


def around(model: M, split: M) -> M:
    """``split`` again, around the very model that was given: what is set on one, both have."""
    return _make_outer(model, cast(Any, split)._ringfx_shared)


def _start_watching(mesh: Any) -> None:
    """Look after the ranks from now on, where there are some; refuse what are none at once."""
    if mesh is not None or (dist.is_available() and dist.is_initialized()):
        world = World.of(mesh)
        if world.size > 1:
            start_watching(world.group)


def _make_outer(inner: M, shared: _Shared, *, is_part: bool = False) -> M:
    outer = _twin(_outer_class(type(inner)), inner.__dict__)
    for slot, value in (
        ("_ringfx_shared", shared), ("_ringfx_inner", inner), ("_ringfx_is_part", is_part),
        ("_ringfx_programs", None), ("_ringfx_parts", {}),
    ):  # fmt: skip
        object.__setattr__(outer, slot, value)
    carry_state(inner, outer)
    return outer


def _twin(kind: type[M], state: Mapping[str, Any]) -> M:
    """An object of that class with that very ``__dict__``."""
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", state)
    return made


def _outer_class(given: type[M]) -> type[M]:
    @functools.wraps(given.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_running(self):  # bound by a patched forward
            return given.forward(self._ringfx_inner, *args, **kwargs)
        return self(*args, **kwargs)

    names = {
        "__module__": given.__module__, "__qualname__": given.__qualname__, "__slots__": (),
        "forward": forward,
    }  # fmt: skip
    return cast(type[M], type(given.__name__, (Optimized, given), names))


def _given_class(outer_class: type) -> Any:
    """The given class behind an outer class, also if fully_shard has put its own in front."""
    mro = outer_class.__mro__
    return mro[mro.index(Optimized) + 1]


def _anew(outer: Optimized) -> _Shared:
    """A copy shares no program and no held gradient."""
    shared = outer._ringfx_shared
    return _Shared(shared.settings, shared.mesh, shared.states)


# --- parts --------------------------------------------------------------------------------------


def _is_part(value: Any) -> bool:
    """A module that can be called and may hold attention; a plain layer runs as it is."""
    if not isinstance(value, torch.nn.Module) or isinstance(value, Optimized):
        return False
    return bool(children_of(value)) and not isinstance(value, (ModuleList, ModuleDict))


def _is_running(outer: Optimized) -> bool:
    backend = outer._ringfx_shared._backend
    return backend is not None and backend.is_running


def _part(outer: Optimized, name: str, module: torch.nn.Module) -> Any:
    """``model.encoder``: called by itself, it is split as the whole model is."""
    known = outer._ringfx_parts.get(name)
    if known is None or known._ringfx_inner is not module:
        known = cast(Optimized, _make_outer(module, outer._ringfx_shared, is_part=True))
        outer._ringfx_parts[name] = known
    return known


# --- running ------------------------------------------------------------------------------------


def _run(outer: Optimized, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of the model, split; or an error, or a warning that says why not."""
    inner, backend = outer._ringfx_inner, outer._ringfx_shared.backend_now()
    if backend.is_running or isinstance(inner, DistributedDataParallel):
        return inner(*args, **kwargs)
    if in_transform():  # nothing would be compiled, and messages of a transform's tensors fail
        backend.announce(why_unsplit())
        return inner(*args, **kwargs)
    try:
        is_part = outer._ringfx_is_part
        with backend.call(inner, args, kwargs, is_part=is_part), _states(outer, backend):
            args, kwargs = cast_inputs((args, kwargs), backend.states, backend.settings.mp_policy)
            return _programs(outer, backend)(*args, **kwargs)
    except RuntimeError as error:
        if backend.states.ranks > 1 and read_no_memory(error):
            raise CaptureRefused(read_uncompiled(describe_error(error))) from error
        raise


@contextlib.contextmanager
def _states(outer: Optimized, backend: Backend) -> Iterator[None]:
    """Sharded parameters stand aside for the call, and uncompiled code gets them gathered."""
    states = backend.states
    if states.ranks == 1:
        yield
        return
    with (
        outer._ringfx_shared.stand_ins.in_place(outer._ringfx_inner, states),
        gathered_on_read(states, backend.world, backend.handoff),
    ):
        yield


def _programs(outer: Optimized, backend: Backend) -> Callable[..., Any]:
    # Hooks are part of the program; those of the model's parts are guarded.
    made_for = (backend, has_hooks(outer._ringfx_inner), hooks_of_all())
    known = outer._ringfx_programs
    if known is None or known[0] != made_for:
        dynamic = backend.settings.dynamic
        known = (made_for, compiled_call(outer._ringfx_inner, backend, dynamic=dynamic))
        object.__setattr__(outer, "_ringfx_programs", known)
    return known[1]
