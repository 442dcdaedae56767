"""Outputs that stay split: the global shape outside, this rank's tokens inside, gathered on touch.

The logits of a causal language model that nobody reads are never gathered: at 128k tokens and a
vocabulary of 128k they are tens of gigabytes. Gradients flow through untouched outputs locally.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from ringfx import messages
from ringfx.collectives import gather_plain, mask_tokens, take_plain
from ringfx.errors import AgreementError
from ringfx.layout import Layout
from ringfx.picks import local_rows, mask_rows
from ringfx.reads import LocalCall, asked_tokens, local_call

__all__ = ["SplitSpec", "SplitTensor", "wrap"]

TOUCH_TIMEOUT = datetime.timedelta(seconds=10)
"""How long a rank that touches a split output waits for the others."""

aten = torch.ops.aten
_LOCAL_OPS = frozenset({aten.detach.default, aten.alias.default})
_outputs = itertools.count()


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """How one output is split; ``dim`` is [outer, tokens, inner]."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    offset: int
    length: int
    dim: int
    outer: int
    inner: int
    rank: int
    group: str
    number: str = field(default="", compare=False)
    """Tells outputs apart, and what is computed from them, in the same words on every rank."""

    def index(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(element that each local token holds, whether it holds one)."""
        own = self.layout.positions(self.rank, device) - self.offset
        return own.clamp(0, self.length - 1), (own >= 0) & (own < self.length)

    def order(self, device: torch.device) -> torch.Tensor:
        return self.layout.order(device)[self.offset : self.offset + self.length]


class SplitTensor(torch.Tensor):
    """A tensor of the global shape whose tokens are spread over the ranks.

    ``ringfx.reads`` says which operators run on each rank's own tokens and which ask for a few
    tokens only; any other gathers it first, on all ranks together, and runs on the whole.
    """

    _local: torch.Tensor
    _spec: SplitSpec
    _whole: torch.Tensor | None
    _made: Counter[str]
    """What was computed from it without gathering, to number the results."""

    @staticmethod
    def __new__(cls, local: torch.Tensor, spec: SplitSpec) -> SplitTensor:
        made: SplitTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, spec.shape, dtype=local.dtype, device=local.device, requires_grad=False
        )
        made._local, made._spec, made._whole, made._made = local, spec, None, Counter()
        return made

    def __tensor_flatten__(self) -> tuple[list[str], SplitSpec]:
        """For Dynamo, when a split output (a key/value cache) is the next call's input."""
        return ["_local"], self._spec

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], spec: SplitSpec, outer_size: Any, outer_stride: Any
    ) -> SplitTensor:
        return SplitTensor(inner["_local"], spec)

    def whole(self) -> torch.Tensor:
        """The whole value on every rank, differentiable; all ranks ask together."""
        whole: torch.Tensor = _Whole.apply(self)  # type: ignore[no-untyped-call]
        return whole

    def to_local(self) -> torch.Tensor:
        """This rank's tokens, padding included."""
        return self._local

    # What follows may be called by code that Dynamo looks at, such as a handler of log lines.

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self._gathered())

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def numpy(self, **kwargs: Any) -> Any:  # type: ignore[override]
        """The whole value as a NumPy array."""
        return self._gathered().numpy(**kwargs)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._gathered().__array__(*args, **kwargs)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def tolist(self) -> Any:
        """The whole value as nested lists."""
        return self._gathered().tolist()

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._gathered().__reduce_ex__(protocol)

    # Uncompiled code of a compiled model may touch it: this is no program to split.
    @classmethod
    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LOCAL_OPS:
            source = args[0]
            made = SplitTensor(func(source._local), source._spec)
            made._whole = source._whole
            return made

        kwargs = kwargs or {}
        found = _without_gathering(func, args, kwargs)
        if found is not None:
            return found

        def whole(x: Any) -> Any:
            return x._gathered() if isinstance(x, SplitTensor) else x

        return func(*tree_map(whole, args), **tree_map(whole, kwargs))

    def _tokens(self, asked: range) -> torch.Tensor:
        """These tokens on every rank: each comes from the rank that has it."""
        spec, local = self._spec, self._local
        _agree_to_touch(spec, f"{asked}{self._next(str(asked))}")
        index = torch.arange(asked.start, asked.stop, asked.step, device=local.device)
        own = spec.layout.positions(spec.rank, local.device) - spec.offset
        rows = local_rows(index, own, spec.length, 1, 1)
        taken = local.index_select(spec.dim, rows.clamp_min(0))
        taken = mask_rows(taken, rows, taken.dim() - spec.dim - 1)
        number = taken.to(torch.uint8) if taken.dtype == torch.bool else taken
        total: torch.Tensor = messages.all_reduce(number, spec.group, spec.name)
        return total.to(taken.dtype)

    def _next(self, what: str) -> str:
        self._made[what] += 1
        return f"#{self._made[what]}"

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _gathered(self) -> torch.Tensor:
        """The whole value; gathered once, on first touch, by all ranks together."""
        if self._whole is None:
            spec = self._spec
            if isinstance(self._local, FakeTensor):  # Dynamo looks at shapes only
                return self._local.new_empty(spec.shape)
            _agree_to_touch(spec)
            with torch.no_grad():
                self._whole = gather_plain(
                    self._local, spec.order(self._local.device), spec.layout.world_size,
                    spec.group, spec.dim, spec.outer, spec.inner, spec.name,
                )  # fmt: skip
        return self._whole


def _without_gathering(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call that needs no more than some tokens; None for others."""
    given = [x for x in args if isinstance(x, SplitTensor)]
    nested = [x for x in tree_leaves((args, kwargs)) if isinstance(x, SplitTensor)]
    if not given or len(nested) != len(given) or not _alike(given):
        return None
    source = given[0]
    asked = asked_tokens(func, source._spec, args, kwargs)
    if asked is not None and 0 < 2 * len(asked[0]) < source._spec.length and _sums(source):
        return func(source._tokens(asked[0]), *asked[1])
    call = local_call(func, source._spec, args, _local_part)
    if call is None or any(isinstance(v, torch.Tensor) for v in kwargs.values()):
        return None
    results = func(*call.args, **kwargs)
    number = f"{source._spec.number}/{func}{source._next(str(func))}"
    return tree_map(lambda x: _again_split(x, source._spec, call, number), results)


def _alike(given: Sequence[SplitTensor]) -> bool:
    """Whether they are split alike, and nothing of them is gathered (or only looked at) already."""
    same = all(x._spec == dataclasses.replace(given[0]._spec, name=x._spec.name) for x in given)
    return same and not any(x._whole is not None or isinstance(x._local, FakeTensor) for x in given)


def _sums(source: SplitTensor) -> bool:
    """Whether every backend sums this type."""
    dtype = source.dtype
    return dtype.is_floating_point or dtype in (torch.int32, torch.int64, torch.bool)


def _local_part(x: Any) -> torch.Tensor | None:
    return x._local if isinstance(x, SplitTensor) else None


def _again_split(result: Any, spec: SplitSpec, call: LocalCall, number: str) -> Any:
    if not isinstance(result, torch.Tensor):
        return result
    shape = list(result.shape)
    shape[call.dim] = call.outer * spec.length * call.inner
    made = dataclasses.replace(
        spec, shape=tuple(shape), dim=call.dim, outer=call.outer, inner=call.inner, number=number
    )
    return SplitTensor(result, made)


class _Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, spec: SplitSpec) -> torch.Tensor:
        ctx.spec = spec
        return SplitTensor(local.detach(), spec)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        spec: SplitSpec = ctx.spec
        index, valid = spec.index(grad.device)
        if isinstance(grad, SplitTensor) and grad._whole is None:
            local = grad._local
            return mask_tokens(local, valid, 0, spec.dim, spec.outer, spec.inner), None
        return take_plain(grad, index, valid, spec.dim, spec.outer, spec.inner), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: SplitTensor) -> torch.Tensor:
        whole: torch.Tensor = split._gathered()
        return whole.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def wrap(local: torch.Tensor, spec: SplitSpec) -> torch.Tensor:
    """This rank's part as a tensor of the global shape, differentiable."""
    numbered = dataclasses.replace(spec, number=str(next(_outputs)))
    wrapped: torch.Tensor = _Wrap.apply(local, numbered)  # type: ignore[no-untyped-call]
    return wrapped


def _agree_to_touch(spec: SplitSpec, part: str = "") -> None:
    """All ranks say that they touch this output before any of them starts to gather.

    Raises
    ------
    AgreementError
        When some ranks do not come: ``if rank == 0: print(logits)`` would hang otherwise.
    """
    store = dist.distributed_c10d._get_default_store()
    key = f"ringfx/touch/{spec.group}/{spec.number}{part}"
    everyone = [f"{key}/{r}" for r in range(spec.layout.world_size)]
    store.set(everyone[spec.rank], "here")
    try:
        store.wait(everyone, TOUCH_TIMEOUT)
        verdict = b"go"
    except RuntimeError:
        verdict = b"failed"
    # The first to know decides for all: a rank that comes late must not gather alone.
    decided = store.compare_set(f"{key}/verdict", "", verdict.decode())
    if decided == b"go":
        return
    missing = [r for r, k in enumerate(everyone) if not store.check([k])]
    late = f"ranks {missing} did not touch it" if missing else "not all ranks touched it"
    raise AgreementError(
        f"{spec.name} {spec.shape} is split over {spec.layout.world_size} ranks and was touched on "
        f"rank {spec.rank}, but {late} within {TOUCH_TIMEOUT.total_seconds():.0f} s; gathering "
        "needs all ranks. Do: touch it on every rank (compute before `if rank == 0`), or pass "
        "outputs='local' to get each rank's own part."
    )
