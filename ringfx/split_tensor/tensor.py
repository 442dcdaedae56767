"""Outputs that stay split: the global shape outside, this rank's tokens inside, gathered on use.

The logits of a causal language model that nobody reads are never gathered: at 128k tokens and a
vocabulary of 128k they are tens of gigabytes. Gradients flow through untouched outputs locally.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ringfx.comm import collective_ops
from ringfx.comm.autograd_function import Function
from ringfx.comm.conjugate import all_gather_tokens, take_tokens
from ringfx.comm.token_lookup import local_rows, mask_rows
from ringfx.errors import SplitWrite
from ringfx.ir.values import Arrival
from ringfx.split_tensor.cell import Cell
from ringfx.split_tensor.deferred import Deferred
from ringfx.split_tensor.local_rules import (
    LocalCall,
    ToOne,
    asked_tokens,
    local_call,
    reduce_to_one,
    writes_where_it_is,
)
from ringfx.split_tensor.sharded_states import refuse_stand_ins
from ringfx.split_tensor.single_op import OperandSpec, single_op_program
from ringfx.split_tensor.slices import gradient_of_slice
from ringfx.split_tensor.spec import SplitSpec, rendezvous_before_gather
from ringfx.torch_compat.autograd import make_wrapper, version_of
from ringfx.torch_compat.dispatch import no_dispatch
from ringfx.torch_compat.fake_tensors import FakeTensor
from ringfx.torch_compat.operators import schema_of
from ringfx.torch_compat.pytree import tree_leaves, tree_map, tree_unflatten

__all__ = ["SplitTensor"]

aten = torch.ops.aten
_LOCAL_OPS = frozenset({aten.detach.default, aten.alias.default})
_NEW = frozenset(
    {
        aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
        aten.new_empty.default, aten.new_empty_strided.default,
    }
)  # fmt: skip


class SplitTensor(torch.Tensor):
    """A tensor of the global shape whose tokens are spread over the ranks.

    ``ringfx.split_tensor.local_rules`` says which operators run on each rank's own tokens and which
    ask for a few tokens only; any other gathers it first, on all ranks together, and runs on the
    whole.
    """

    _cell: Cell
    _spec: SplitSpec

    @staticmethod
    def __new__(cls, cell: Cell, spec: SplitSpec) -> SplitTensor:
        local = cell.held
        made: SplitTensor = make_wrapper(
            cls, spec.shape, dtype=local.dtype, device=local.device, requires_grad=False
        )
        made._cell, made._spec = cell, spec
        return made

    @property
    def _local(self) -> torch.Tensor:
        return self._cell.local

    @property
    def _whole(self) -> torch.Tensor | None:
        return self._cell.whole

    def __tensor_flatten__(self) -> tuple[list[str], SplitSpec]:
        """For Dynamo, when a split output is the next program's input."""
        return ["_local"], self._spec

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], spec: SplitSpec, outer_size: Any, outer_stride: Any
    ) -> SplitTensor:
        return SplitTensor(Cell(inner["_local"]), spec)

    def whole(self) -> torch.Tensor:
        """The whole value on every rank, differentiable; all ranks ask together."""
        whole: torch.Tensor = _Whole.apply(self)  # type: ignore[no-untyped-call]
        return whole

    def to_local(self) -> torch.Tensor:
        """This rank's tokens, padding included."""
        self._refuse_lost_writes()
        if self._is_current():
            return self._local
        assert self._whole is not None
        own = self._spec.layout.positions(self._spec.rank, self.device) - self._spec.offset
        index = own.remainder(self._spec.length)
        return take_tokens(self._whole, index, self._spec.dim, self._spec.outer, self._spec.inner)

    def _is_view(self) -> bool:
        """No: Dynamo would make the view again from its base, where this is a part of its own."""
        return False

    # What follows may be called by code that Dynamo looks at, such as a handler of log lines.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self._gathered())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def numpy(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """The whole value as a NumPy array."""
        return self._gathered().numpy(**kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._gathered().__array__(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def tolist(self) -> Any:
        """The whole value as nested lists."""
        return self._gathered().tolist()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._gathered().__reduce_ex__(protocol)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __deepcopy__(self, memo: Any) -> Any:
        """The whole value; of a result with a gradient torch makes no copy."""
        return copy.deepcopy(self._gathered(), memo)

    # Uncompiled code of a compiled model may touch it: this is no program to split.
    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LOCAL_OPS:
            return SplitTensor(args[0]._cell, args[0]._spec)
        kwargs = kwargs or {}
        refuse_stand_ins(func, (args, kwargs))
        if schema_of(func).is_mutable:
            return _write(func, args, kwargs)
        if func.is_view and args[0]._cell.aliased:  # views of the whole are views for all of them
            return _with_whole(func, args, kwargs)
        for run in (
            _made_like, _still_deferred, _as_looked_at, _without_gathering, _of_a_slice, _as_program
        ):  # fmt: skip
            found = run(func, args, kwargs)
            if found is not None:
                return found
        return _with_whole(func, args, kwargs)

    def _tokens(self, asked: range) -> torch.Tensor:
        """These tokens on every rank: each comes from the rank that has it."""
        spec, device = self._spec, self.device
        rendezvous_before_gather(spec, f"{asked}{self._next(str(asked))}")
        index = torch.arange(asked.start, asked.stop, asked.step, device=device)
        own = spec.layout.positions(spec.rank, device) - spec.offset
        rows = local_rows(index, own, spec.length, 1, 1)
        taken = self._cell.rows(spec.dim, rows.clamp_min(0))
        taken = mask_rows(taken, rows, taken.dim() - spec.dim - 1)
        number = taken.to(torch.uint8) if taken.dtype == torch.bool else taken
        total: torch.Tensor = collective_ops.all_reduce(number, spec.group, spec.name)
        return total.to(taken.dtype)

    def _reduced(self, func: Any, to_one: ToOne, kwargs: dict[str, Any]) -> torch.Tensor:
        """One number of all tokens, from one of each rank's own."""
        spec, local = self._spec, self._local
        rendezvous_before_gather(spec, f"{func}{self._next(str(func))}")
        _, valid = spec.index(local.device)
        mine = take_tokens(local, valid.nonzero().view(-1), spec.dim, spec.outer, spec.inner)
        number = to_one.part(mine, **kwargs)
        everyone = collective_ops.all_gather(number, spec.layout.world_size, spec.group, spec.name)
        total = to_one.joined(everyone)
        total = total / self.numel() if to_one.is_mean else total
        return total.to(func(local.new_empty(1), **kwargs).dtype)

    def _next(self, what: str) -> str:
        self._cell.made[what] += 1
        return f"#{self._cell.made[what]}"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _gathered(self) -> torch.Tensor:
        """The complete value; gathered once, on first use, by all ranks together."""
        cell, spec = self._cell, self._spec
        if cell.whole is None:
            if isinstance(cell.local, FakeTensor):  # Dynamo looks at shapes only
                return cell.local.new_empty(spec.shape)
            self._refuse_lost_writes()
            told = cell.on_gather
            if told is not None and (told.model_runs or self.requires_grad):
                told(spec, self.numel() * self.element_size())
            rendezvous_before_gather(spec)
            cell.gathered_at = None if self.is_inference() else version_of(self)
            with torch.no_grad():
                cell.whole = all_gather_tokens(
                    cell.local, spec.order(cell.local.device), spec.layout.world_size,
                    spec.group, spec.dim, spec.outer, spec.inner, spec.name,
                )  # fmt: skip
        return cell.whole

    def _refuse_lost_writes(self) -> None:
        """A part was handed out where torch promises a view, and has been written since."""
        if self._cell.viewed is not None and version_of(self) != self._cell.viewed:
            raise SplitWrite(_lost_write_text(self._spec))

    def _is_current(self) -> bool:
        """Whether this rank's part is the value: views of the whole may have been written since."""
        cell = self._cell
        known = cell.gathered_at is not None and not cell.aliased
        return cell.whole is None or (known and cell.gathered_at == version_of(self))

    def _can_stay(self) -> bool:
        """Whether a call may use this rank's part.

        Between programs all ranks run the same calls; outside, what was gathered once needs no
        other rank any more.
        """
        if isinstance(self._cell.held, FakeTensor):
            return False
        return self._whole is None or (self._is_inside() and self._is_current())

    def _is_inside(self) -> bool:
        """Whether it is a value between programs of a model that runs."""
        return self._cell.on_gather is not None and self._cell.on_gather.model_runs

    def _stays_in(self, func: Any) -> bool:
        """Outside a model views are taken to be written, unless they lead to a loss."""
        return self._is_inside() or self.requires_grad or not func.is_view

    def _hand_out(self) -> None:
        if self._cell.viewed is None and not self.is_inference():
            self._cell.viewed = version_of(self)


def _with_whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def whole(x: Any) -> Any:
        return x._gathered() if isinstance(x, SplitTensor) else x

    return func(*tree_map(whole, args), **tree_map(whole, kwargs))


def _write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator that writes: into this rank's tokens where it can, else into the whole."""
    if torch.Tag.inplace_view in func.tags:
        return _turn_in_place(func, args, kwargs)
    written = [
        value
        for argument, value in zip(schema_of(func).arguments, args, strict=False)
        if argument.is_write and isinstance(value, SplitTensor)
    ]
    for value in written:
        if value._cell.viewed is not None or value._cell.views:
            raise SplitWrite(_lost_write_text(value._spec))
    if [x is args[0] for x in written] == [True] and _write_local(func, args, kwargs):
        return args[0]
    result = _with_whole(func, args, kwargs)
    same = {id(value._whole): value for value in written}
    return tree_map(lambda x: same.get(id(x), x), result)


def _turn_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SplitTensor:
    """``x.squeeze_()``: the tensor becomes a view of what it was."""
    value: SplitTensor = args[0]
    view = _view_of_its_kind(func)
    found = None if view is None else view(*args, **kwargs)
    if isinstance(found, SplitTensor):
        value._cell, value._spec = found._cell, found._spec
        if value._cell.viewed is not None:
            value._cell.viewed += 1  # torch counts this call as a write
    elif found is not None and isinstance(value._local, FakeTensor):
        value._spec = dataclasses.replace(value._spec, shape=tuple(found.shape))
    else:
        raise SplitWrite(
            f"{value._spec.name} {value._spec.shape} is split over "
            f"{value._spec.layout.world_size} ranks, and {func} changes its shape in place, which "
            "needs all of its tokens. Do: make a new tensor, such as x = x.unsqueeze(0) instead "
            "of x.unsqueeze_(0)."
        )
    shape = value._spec.shape
    with no_dispatch():  # contiguous, as every split tensor says it is
        value.as_strided_(shape, torch.empty(shape, device="meta").stride())
    return value


def _view_of_its_kind(func: Any) -> Any:
    """``aten.squeeze.dim`` for ``aten.squeeze_.dim``."""
    packet = getattr(aten, schema_of(func).name.partition("::")[2].removesuffix("_"), None)
    overloads = [] if packet is None else [getattr(packet, name) for name in packet.overloads()]
    asked = [str(a.type) for a in schema_of(func).arguments]
    return next(
        (o for o in overloads if [str(a.type) for a in schema_of(o).arguments] == asked), None
    )


def _write_local(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if args[0]._whole is not None:  # later readers take it, and views of it may have been given
        return False
    given = [x for x in args if isinstance(x, SplitTensor)]
    nested = [x for x in tree_leaves((args, kwargs)) if isinstance(x, SplitTensor)]
    if len(nested) != len(given) or not _alike(given) or not writes_where_it_is(func):
        return False
    call = local_call(func, args[0]._spec, args, _local_part)
    if call is None or any(isinstance(v, torch.Tensor) for v in kwargs.values()):
        return False
    target, *rest = call.args
    args[0]._cell.held = func(target.clone(), *rest, **kwargs)
    return True


def _lost_write_text(spec: SplitSpec) -> str:
    return (
        f"{spec.name} {spec.shape} is split over {spec.layout.world_size} ranks. A view of a part "
        "of it exists (a slice, a row, another shape), and one of the two is written in place: "
        "the other would not see the write. Do: write before you take the view, or take the part "
        "with .clone()."
    )


def _without_gathering(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call that needs no more than some tokens; None for others."""
    given = [x for x in args if isinstance(x, SplitTensor)]
    nested = [x for x in tree_leaves((args, kwargs)) if isinstance(x, SplitTensor)]
    if not given or len(nested) != len(given) or not _alike(given):
        return None
    source = max(given, key=torch.Tensor.dim)
    to_one = reduce_to_one(func, kwargs)
    if to_one is not None and len(args) == 1 and source._spec.is_on_every_rank():
        return source._reduced(func, to_one, kwargs)
    asked = _few_tokens(func, source, args, kwargs)
    if asked is not None:
        source._hand_out()
        return func(source._tokens(asked[0]), *asked[1])
    call = local_call(func, source._spec, args, _local_part)
    if call is None or any(isinstance(v, torch.Tensor) for v in kwargs.values()):
        return None
    results = func(*call.args, **kwargs)
    number = f"{source._spec.number}/{func}{source._next(str(func))}"
    return tree_map(lambda x: _again_split(x, source, call, number, func.is_view), results)


def _few_tokens(
    func: Any, source: SplitTensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[range, tuple[Any, ...]] | None:
    """What ``asked_tokens`` says, where moving these tokens is worth it."""
    asked = asked_tokens(func, source._spec, args, kwargs)
    few = asked is not None and 0 < 2 * len(asked[0]) < source._spec.length
    return asked if few and _sums(source) else None


def _as_looked_at(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dynamo makes a row that was handed out again, and compares strides; None for other calls."""
    source = args[0]
    if not func.is_view or not isinstance(source._cell.held, FakeTensor):
        return None
    asked = _few_tokens(func, source, args, kwargs)
    if asked is None:
        return None
    shape = list(source._spec.shape)
    shape[source._spec.dim] = len(asked[0])
    return func(source._local.new_empty(shape), *asked[1])


def _made_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x.new_zeros(...)`` takes no more of x than its type."""
    if func not in _NEW:
        return None
    some = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
    return func(some, *args[1:], **kwargs)


def _still_deferred(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``logits.float()`` is computed when it is touched as well."""
    held = args[0]._cell.held if isinstance(args[0], SplitTensor) else None
    if func is not aten._to_copy.default or kwargs.keys() != {"dtype"}:
        return None
    if not isinstance(held, Deferred) or args[0]._whole is not None:
        return None
    source: SplitTensor = args[0]
    number = f"{source._spec.number}/{func}{source._next(str(func))}"
    spec = dataclasses.replace(source._spec, number=number)
    return SplitTensor(Cell(held.to(kwargs["dtype"]), on_gather=source._cell.on_gather), spec)


def _of_a_slice(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The gradient of what was sliced; None for other calls."""
    source = args[0]
    if func is not aten.slice_backward.default or not source._can_stay():
        return None
    number = f"{source._spec.number}/{func}{source._next(str(func))}"
    found = gradient_of_slice(source._spec, source._local, args, number)
    return found and SplitTensor(Cell(found[0], on_gather=source._cell.on_gather), found[1])


def _as_program(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call, run as a program of its own; None if it gathers."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    split = [x for x in given if isinstance(x, SplitTensor)]
    if not all(x._can_stay() and x._stays_in(func) for x in split):
        return None
    source = split[0]
    spec = source._spec
    call = single_op_program(func, args, kwargs, _described, spec.rank, spec.group)
    if call is None:
        return None
    number = f"{spec.number}/{func}{source._next(str(func))}"
    if call.sends:
        rendezvous_before_gather(spec, number)
    results = call.run(*(x._local if isinstance(x, SplitTensor) else x for x in given))
    wrapped = [
        _made_split(result, source, how, f"{number}.{i}", func.is_view)
        for i, (result, how) in enumerate(zip(results, call.outputs, strict=True))
    ]
    return tree_unflatten(wrapped, call.structure)


def _described(value: torch.Tensor) -> OperandSpec:
    arrival = value._spec.arrival() if isinstance(value, SplitTensor) else None
    return OperandSpec(
        shape=tuple(value.shape), dtype=value.dtype, device=value.device, arrival=arrival
    )


def _made_split(
    result: torch.Tensor,
    source: SplitTensor,
    how: tuple[tuple[int, ...], Arrival] | None,
    number: str,
    is_view: bool,
) -> torch.Tensor:
    if how is None:
        if is_view:
            source._hand_out()
        return result
    shape, arrival = how
    spec = source._spec.with_arrival(arrival, shape, number)
    return _viewing(result, source, spec, is_view)


def _viewing(
    result: torch.Tensor, source: SplitTensor, spec: SplitSpec, is_view: bool
) -> torch.Tensor:
    cell = Cell(result, on_gather=source._cell.on_gather)
    if is_view:
        cell.viewed = None if source.is_inference() else version_of(source)
        source._cell.views.add(cell)
    return SplitTensor(cell, spec)


def _alike(given: Sequence[SplitTensor]) -> bool:
    """Whether they are split alike, and each rank's part of them is there to be used."""
    same = all(x._spec.tokens() == given[0]._spec.tokens() for x in given)
    return same and all(x._can_stay() for x in given)


def _sums(source: SplitTensor) -> bool:
    """Whether every backend sums this type."""
    dtype = source.dtype
    return dtype.is_floating_point or dtype in (torch.int32, torch.int64, torch.bool)


def _local_part(x: Any) -> torch.Tensor | None:
    return x._local if isinstance(x, SplitTensor) else None


def _again_split(
    result: Any, source: SplitTensor, call: LocalCall, number: str, is_view: bool
) -> Any:
    if not isinstance(result, torch.Tensor):
        return result
    spec = source._spec
    shape = list(result.shape)
    shape[call.dim] = call.outer * spec.length * call.inner
    made = dataclasses.replace(
        spec, shape=tuple(shape), dim=call.dim, outer=call.outer, inner=call.inner, number=number
    )
    return _viewing(result, source, made, is_view)


class _Whole(Function):
    @staticmethod
    def forward(ctx: Any, split: SplitTensor) -> torch.Tensor:
        whole: torch.Tensor = split._gathered()
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]
