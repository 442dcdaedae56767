"""Values that planning may use: what the caller gave, and what follows from it alone.

A plan is made on fake tensors, which have no values. Where the model's own Python reads one
(``mask.any()``, ``lengths.max().item()``), the mode here answers: it remembers how each fake tensor
was made, and if all of that starts at given values, this little part is computed for real.
Otherwise it assumes an ordinary value, and says which and where.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ringfx.compile.planned_arrivals import hand_on, picked_from
from ringfx.torch_compat.autograd import storage_id
from ringfx.torch_compat.dispatch import disable_current_modes
from ringfx.torch_compat.fake_tensors import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    as_fake,
    unset_fake_temporarily,
)
from ringfx.torch_compat.operators import OpOverload, schema_of
from ringfx.torch_compat.pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from ringfx.units.format import format_bytes

__all__ = ["GivenMode"]

aten = torch.ops.aten

CHOICES = frozenset([aten.topk.default, aten.max.dim, aten.argmax.default])
"""Their last result says which of the last dim's elements were chosen."""

PICKS = frozenset([aten.index.Tensor, aten.masked_select.default])
"""Take the elements for which a mask is true."""
ELEMENTS = frozenset([aten.nonzero.default, aten.masked_select.default])
"""Find them."""

MOST_ELEMENTS = 2**24
"""Of all values that may be computed to answer one question."""


@dataclass(eq=False)
class _Value:
    """How one tensor was made: given, assumed, or by an operator from others."""

    real: torch.Tensor | None = None
    func: Any = None
    leaves: tuple[Any, ...] = ()
    """Arguments of ``func``, flat, values in the places of tensors."""
    tree: Any = None
    result: int = 0
    """Which of the results of ``func``."""
    elements: int = 0
    assumed: str = ""
    """In words, what it was assumed to hold."""
    make: Any = None
    """Makes the assumed tensor."""
    is_input: bool = False
    """Assumed for an input of which only the shape was given."""
    sources: tuple[_Value, ...] = field(default=(), repr=False)


@dataclass(frozen=True, eq=False)
class _Step:
    """One view of a tensor."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: int

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        made = tree_leaves(self.func(source, *self.args, **self.kwargs))
        view: torch.Tensor = made[self.result]
        return view


@dataclass(frozen=True, eq=False)
class _Write:
    """A write through views, as a function of the tensor that they are views of."""

    func: Any
    steps: tuple[_Step, ...]

    def __call__(self, base: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = base.clone()
        view = result
        for step in self.steps:
            view = step(view)
        self.func(view, *args, **kwargs)
        return result


class GivenMode(FakeTensorMode):
    """Fake tensors whose values are known as far as they follow from given ones."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[str, None] = {}
        """What was assumed, in words."""
        self._values: Any = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]
        self._views: Any = WeakIdKeyDictionary()  # type: ignore[no-untyped-call]
        """View -> what it is a view of, and how."""
        self._picks = False
        """Whether the operator that is running takes elements by a mask."""

    def give(self, fake: torch.Tensor, real: torch.Tensor) -> None:
        """The fake tensor stands for this one."""
        self._values[fake] = _Value(real=real.detach())

    def assume(self, fake: torch.Tensor, name: str) -> None:
        """An input of which only the shape was given: a mask hides nothing, other numbers are 0."""
        if fake.is_floating_point() or fake.is_complex():
            return
        number = int("mask" in name or fake.dtype == torch.bool)
        shape, dtype = tuple(fake.shape), fake.dtype
        self._values[fake] = _Value(
            elements=fake.numel(),
            assumed=f"{name} to hold {'ones' if number else 'zeros'}",
            make=lambda: torch.full(shape, number, dtype=dtype),
            is_input=True,
        )

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in PICKS and (source := picked_from(func, args)) is not None:
            self._say_gathered(source)
        outer, self._picks = self._picks, self._picks or func in PICKS
        try:
            made = super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._answer(func, args, kwargs)
        finally:
            self._picks = outer
        if isinstance(func, OpOverload):
            self._remember(func, args, kwargs, made)
            hand_on(func, args, kwargs, made)
        return made

    # --- remembering ----------------------------------------------------------------------------

    def _remember(self, func: Any, args: Any, kwargs: dict[str, Any], made: Any) -> None:
        results = [x for x in tree_leaves(made) if isinstance(x, FakeTensor)]
        value = None if _is_random(func) else self._made_by(func, args, kwargs)
        if schema_of(func).is_mutable:
            through_views = self._written_base(func, args, kwargs)
            self._forget_written(func, args, kwargs)
            if through_views is not None:
                base, rewritten = through_views
                self._values[base] = rewritten
        elif func.is_view and args and isinstance(args[0], FakeTensor):
            for i, x in enumerate(results):
                step = _Step(func, tuple(args[1:]), kwargs, i)
                self._views[x] = (weakref.ref(args[0]), step)
        for i, x in enumerate(results):
            if value is None:
                self._values.pop(x, None)
            else:
                value_of = _Value(
                    func=func, leaves=value.leaves, tree=value.tree, result=i,
                    elements=x.numel(), sources=value.sources,
                )  # fmt: skip
                self._values[x] = value_of
        if value is None and func in CHOICES:
            self._assume_choice(func, args[0], results[-1])

    def _assume_choice(self, func: Any, source: torch.Tensor, chosen: FakeTensor) -> None:
        """A choice by unknown scores, as a router's of experts: each is chosen as often."""
        if chosen.dim() not in (source.dim(), source.dim() - 1) or not source.dim():
            return
        if chosen.shape[: source.dim() - 1] != source.shape[:-1]:
            return  # not along the last dim
        num, shape = source.shape[-1], tuple(chosen.shape)
        name = schema_of(func).name.removeprefix("aten::")
        self._values[chosen] = _Value(
            elements=chosen.numel(),
            assumed=f"{name} to choose each of {num} as often",
            make=lambda: (torch.arange(math.prod(shape)) % num).reshape(shape),
        )

    def _value(self, x: torch.Tensor) -> _Value | None:
        known: _Value | None = self._values.get(x)
        is_constant = type(x) is torch.Tensor and x.device.type != "meta"
        return _Value(real=x) if known is None and is_constant else known

    def _made_by(self, func: Any, args: Any, kwargs: dict[str, Any]) -> _Value | None:
        leaves, tree = tree_flatten((args, kwargs))
        known = [self._value(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        if any(
            isinstance(x, torch.Tensor) and v is None for x, v in zip(leaves, known, strict=True)
        ):
            return None
        sources = tuple(v for v in known if isinstance(v, _Value))
        return _Value(func=func, leaves=tuple(known), tree=tree, sources=sources)

    def _written_base(
        self, func: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[FakeTensor, _Value] | None:
        """What a write into a view (``mask[:, 0] = 1``) leaves in what it is a view of."""
        if not args or not isinstance(args[0], FakeTensor) or args[0] not in self._views:
            return None
        steps: list[_Step] = []
        base = args[0]
        while base in self._views:
            source, step = self._views[base]
            steps.insert(0, step)
            base = source()
            if base is None:
                return None
        rest = self._made_by(func, args[1:], kwargs)
        if rest is None or base not in self._values:
            return None
        before = self._values[base]
        written = _Value(
            func=_Write(func, tuple(steps)), leaves=(before, *rest.leaves),
            tree=tree_flatten(((base, *args[1:]), kwargs))[1], elements=base.numel(),
            sources=(before, *rest.sources),
        )  # fmt: skip
        return base, written

    def _forget_written(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Views of what is written hold other values now; what wrote it is remembered anew."""
        named = zip(schema_of(func).arguments, args, strict=False)
        written = [x for a, x in named if a.is_write] + [
            kwargs[a.name] for a in schema_of(func).arguments if a.is_write and a.name in kwargs
        ]
        for x in tree_leaves(written):
            if isinstance(x, FakeTensor):
                memory = storage_id(x)
                for other in [t for t in self._values if storage_id(t) == memory]:
                    del self._values[other]

    # --- answering ------------------------------------------------------------------------------

    def _answer(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        value = self._made_by(func, args, kwargs)
        if value is not None and _cost(value) <= MOST_ELEMENTS:
            found, assumed = _evaluate(value)
            if self._picks and _is_of_inputs(value) and func in ELEMENTS and not found.numel():
                # By zeros, or by a mask that says what is hidden, no token would be left to plan.
                return self._ordinary(func, args, kwargs)
            for words in assumed:
                self._say(words)
            return self._faked(found)
        return self._ordinary(func, args, kwargs)

    def _faked(self, found: Any) -> Any:
        def fake(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            with unset_fake_temporarily():
                made = as_fake(self, x)
            self.give(made, x)
            return made

        return tree_map(fake, found)

    def _ordinary(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What is most common, where a value is not known."""
        source = args[0]
        if func is aten._local_scalar_dense.default:
            with unset_fake_temporarily(), disable_current_modes():
                zero = torch.zeros((), dtype=source.dtype).item()
            self._say(f"a number that depends on unknown values to be {zero}")
            return zero
        if func is aten.nonzero.default:
            self._say(f"every element of {list(source.shape)} to be nonzero")
            with self:
                each = [torch.arange(n, device=source.device) for n in source.shape]
                return torch.cartesian_prod(*each).view(-1, source.dim())
        if func is aten.masked_select.default:
            self._say(f"every element of {list(source.shape)} to be selected")
            with self:
                return source.expand(torch.broadcast_shapes(source.shape, args[1].shape)).reshape(
                    -1
                )
        if func is aten.equal.default:
            self._say("two tensors of unknown values to be equal")
            return True
        raise DataDependentOutputException(func)

    def _say(self, what: str) -> None:
        self.notes[
            f"planning assumed {what}: {_users_line()} reads tensor values, which are unknown "
            "while planning"
        ] = None

    def _say_gathered(self, source: torch.Tensor) -> None:
        self.notes[
            f"{_users_line()}: gathers {format_bytes(source.numel() * source.element_size())} on "
            "every rank: it picks tokens by a mask or by their numbers, outside the compiled "
            "programs"
        ] = None


def _is_random(func: Any) -> bool:
    empty = schema_of(func).name.startswith(("aten::empty", "aten::new_empty"))
    return torch.Tag.nondeterministic_seeded in func.tags or empty


def _in_order(value: _Value) -> list[_Value]:
    """All that it is made of, what is needed first first."""
    done: dict[int, _Value] = {}
    stack: list[tuple[_Value, bool]] = [(value, False)]
    while stack:
        node, is_ready = stack.pop()
        if id(node) in done:
            continue
        if is_ready:
            done[id(node)] = node
            continue
        stack.append((node, True))
        stack += [(x, False) for x in node.sources if id(x) not in done]
    return list(done.values())


def _is_of_inputs(value: _Value) -> bool:
    """Whether it rests on what was assumed, and on no assumption but of inputs."""
    assumed = [x for x in _in_order(value) if x.make is not None]
    return bool(assumed) and all(x.is_input for x in assumed)


def _cost(value: _Value) -> int:
    return sum(x.elements for x in _in_order(value) if x.real is None)


def _evaluate(value: _Value) -> tuple[Any, list[str]]:
    """Its real value, and what had to be assumed for it."""
    found: dict[int, Any] = {}
    with unset_fake_temporarily(), disable_current_modes(), torch.no_grad():
        for node in _in_order(value):
            found[id(node)] = _computed(node, found, is_last=node is value)
    return found[id(value)], [x.assumed for x in _in_order(value) if x.assumed]


def _computed(node: _Value, found: Mapping[int, Any], *, is_last: bool) -> Any:
    if node.real is not None:
        return node.real
    if node.make is not None:
        return node.make()
    writes = not isinstance(node.func, _Write) and schema_of(node.func).is_mutable
    given = [found[id(x)] if isinstance(x, _Value) else x for x in node.leaves]
    given = [x.clone() if writes and isinstance(x, torch.Tensor) else x for x in given]
    args, kwargs = tree_unflatten(given, node.tree)
    if any(isinstance(x, _Value) and x.make is not None for x in node.leaves):
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
    made = node.func(*args, **kwargs)
    return (
        made
        if is_last
        else [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)][node.result]
    )


def _users_line() -> str:
    """The innermost frame that is neither torch's nor ours: ``model.py:12``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module not in ("torch", "ringfx"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "code that is not Python"
