"""Write autocast into the program: every cast that it would make becomes a call.

Autocast works below the level at which a program is recorded: the calls stand there with the
operands that the user gave, and their types would be known only when the program runs. So each
operator that autocast has a rule for is recorded as its casts and then itself, with autocast off.
The rules are not copied from torch: the operator is called once on fake operands, and what autocast
does to them is watched. From here on no autocast state matters, at compilation or at run time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from ringfx.torch_compat import pytree
from ringfx.torch_compat.autograd import ENTER_AUTOCAST, EXIT_AUTOCAST, autocast_is_enabled
from ringfx.torch_compat.dispatch import TorchDispatchMode
from ringfx.torch_compat.fake_tensors import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from ringfx.torch_compat.operators import DispatchKey, OpOverload, names_with_kernel, schema_of

__all__ = [
    "Autocast",
    "AutocastInterpreter",
    "autocast_off",
    "decompositions_with_casts",
    "enters_autocast",
]

aten = torch.ops.aten
Decomposition = Callable[..., Any]
_ENTERS = (ENTER_AUTOCAST, torch.set_autocast_enabled)
_NARROW = (torch.float16, torch.bfloat16)
_PRODUCTS = (aten.einsum.default, aten.tensordot.default)
"""Made of one product if they have two operands: casting these is what autocast does, and keeps
their axes."""


@functools.cache
def _keys() -> Mapping[str, DispatchKey]:
    """The dispatch key of autocast for each type of device that has one."""
    named = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}
    return {d: getattr(DispatchKey, f"Autocast{name}") for d, name in named.items()}


@dataclass(frozen=True, kw_only=True)
class Autocast:
    """What autocast is set to, for each type of device."""

    states: tuple[tuple[str, torch.dtype, bool], ...]

    @classmethod
    def now(cls) -> Autocast:
        return cls(
            states=tuple(
                (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
                for device in _keys()
            )
        )

    @property
    def is_on(self) -> bool:
        return any(enabled for _, _, enabled in self.states)

    def set(self) -> None:
        for device, dtype, enabled in self.states:
            torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_enabled(device, enabled)

    def entered(self, device: str, dtype: torch.dtype | None, enabled: bool) -> Autocast:
        """As inside ``torch.autocast(device, dtype, enabled)``, which knows what is supported."""
        inside = torch.autocast(device, dtype=dtype, enabled=enabled)
        new = (device, inside.fast_dtype, autocast_is_enabled(inside))
        return Autocast(states=(*(s for s in self.states if s[0] != device), new))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """This state inside, and afterwards the one before."""
        before = Autocast.now()
        self.set()
        try:
            yield
        finally:
            before.set()


@contextlib.contextmanager
def autocast_off() -> Iterator[None]:
    """No operator changes the types of its operands inside: a captured program says all casts."""
    off = tuple((device, dtype, False) for device, dtype, _ in Autocast.now().states)
    with Autocast(states=off).active():
        yield


def enters_autocast(gm: torch.fx.GraphModule) -> bool:
    """Whether autocast is on, or is turned on somewhere in this program."""
    modules = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]
    return Autocast.now().is_on or any(
        node.target in _ENTERS or getattr(node.target, "__name__", "") == "wrap_with_autocast"
        for module in modules
        for node in module.graph.nodes
    )


class AutocastInterpreter(torch.fx.Interpreter):
    """Enters and leaves autocast where the program does; tracing would only record that."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self._outer: list[Autocast] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is ENTER_AUTOCAST:
            self._outer.append(Autocast.now())
            return self._outer[-1].entered(*args[:3]).set()
        if target is EXIT_AUTOCAST:
            return self._outer.pop().set()
        return super().call_function(target, args, kwargs)


def decompositions_with_casts(
    table: Mapping[OpOverload, Decomposition],
) -> dict[OpOverload, Decomposition]:
    """A table of decompositions for tracing under autocast: its casts first, then the table's."""
    rules = _Rules(table)
    return {**table, **{op: functools.partial(rules.call, op) for op in _concerned()}}


@functools.cache
def _concerned() -> tuple[OpOverload, ...]:
    """Operators with a rule for some type of device, and those made of others."""
    keys = [key.name for key in _keys().values()] + ["CompositeImplicitAutograd"]
    names = {name for key in keys for name in names_with_kernel(key)}
    found = (_overload(name) for name in sorted(names))
    return tuple(op for op in found if op is not None and not schema_of(op).is_mutable)


def _overload(name: str) -> OpOverload | None:
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    try:
        op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    except AttributeError:  # registered, without a schema that Python could call
        return None
    return op if isinstance(op, OpOverload) else None


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """What autocast does to a call."""

    casts: Mapping[int, torch.dtype] = field(default_factory=dict)
    """New types of operands, by their number among all arguments, flattened."""
    dtype: torch.dtype | None = None
    """The value of the argument ``dtype``, which the user left open."""
    takes_apart: bool = False
    """It does nothing to this operator, but to those that it is made of."""


class _Rules:
    """Autocast's rules as they are met; layers that are alike share what was watched."""

    def __init__(self, table: Mapping[OpOverload, Decomposition]) -> None:
        self._table = table
        self._known: dict[Any, _Rule] = {}

    def call(self, op: OpOverload, *args: Any, **kwargs: Any) -> Any:
        """Decomposes a call into casts and the call; NotImplemented where it stays as it is."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        device = _device(leaves)
        if device is not None and torch.is_autocast_enabled(device):
            rule = self._rule(op, leaves, structure, device)
            if rule.casts or rule.dtype is not None:
                return _followed(op, rule, leaves, structure)
            if rule.takes_apart:
                made = self._from_table(op, args, kwargs)
                return op.decompose(*args, **kwargs) if made is NotImplemented else made
        return self._from_table(op, args, kwargs)

    def _from_table(self, op: OpOverload, args: Any, kwargs: Any) -> Any:
        known = self._table.get(op)
        return NotImplemented if known is None else known(*args, **kwargs)

    def _rule(
        self, op: OpOverload, leaves: Sequence[Any], structure: pytree.TreeSpec, device: str
    ) -> _Rule:
        key = (op, structure, torch.get_autocast_dtype(device), *map(_described, leaves))
        try:
            known = self._known.get(key)
        except TypeError:  # an argument that cannot be compared
            return _watched(op, leaves, structure, device)
        if known is None:
            known = self._known[key] = _watched(op, leaves, structure, device)
        return known


def _device(leaves: Sequence[Any]) -> str | None:
    floating = (x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point())
    return next((x.device.type for x in floating if x.device.type in _keys()), None)


def _described(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return torch.Tensor, leaf.dtype, leaf.device, tuple(leaf.shape)
    return type(leaf), leaf


def _followed(
    op: OpOverload, rule: _Rule, leaves: Sequence[Any], structure: pytree.TreeSpec
) -> Any:
    cast = [x.to(rule.casts[i]) if i in rule.casts else x for i, x in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(cast, structure)
    if rule.dtype is not None:
        kwargs = {**kwargs, "dtype": rule.dtype}
    with autocast_off():
        return op(*args, **kwargs)


def _watched(
    op: OpOverload, leaves: Sequence[Any], structure: pytree.TreeSpec, device: str
) -> _Rule:
    """What autocast does to a call, by calling."""
    if not op.has_kernel_for_dispatch_key(_keys()[device]):
        others = _reaches_others(op, leaves, structure)
        factors = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        if not (others and op in _PRODUCTS and len(factors) == 2):
            return _Rule(takes_apart=others)
        castable = (i for i in factors if _is_castable(leaves[i]))
        return _Rule(casts=dict.fromkeys(castable, torch.get_autocast_dtype(device)))
    seen = _run(op, leaves, structure)
    if seen.casts:
        return _Rule(casts=seen.casts)
    narrow = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and _is_narrow(x)]
    if not narrow or torch.float32 not in seen.results:
        return _Rule()
    if any(a.name == "dtype" for a in schema_of(op).arguments):
        return _Rule(dtype=torch.float32)
    return _Rule(casts=dict.fromkeys(narrow, torch.float32))


def _reaches_others(op: OpOverload, leaves: Sequence[Any], structure: pytree.TreeSpec) -> bool:
    """Whether autocast changes what an operator that it has no rule for is made of.

    It casts by itself perhaps, so calls with and without autocast are compared; of one type, since
    without autocast types may not be mixed.
    """
    if not any(func is aten._to_copy.default for func, *_ in _run(op, leaves, structure).calls):
        return False
    for dtype in (torch.float32, torch.bfloat16):
        with autocast_off():
            plain = _run(op, leaves, structure, dtype)
        if plain.calls != _run(op, leaves, structure, dtype).calls:
            return True
    return False


def _is_castable(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float32, *_NARROW)


def _is_narrow(x: torch.Tensor) -> bool:
    return x.dtype in _NARROW


class _Watch(TorchDispatchMode):
    """The casts of a call's own operands, up to the first call of another kind."""

    def __init__(self, operands: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands = {id(x): i for i, x in enumerate(operands) if isinstance(x, torch.Tensor)}
        self.casts: dict[int, torch.dtype] = {}
        self.calls: list[Any] = []
        self.results: set[torch.dtype] = set()
        self._casting = True

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # a question of the device, which fake tensors ask
            return result
        given = [x.dtype for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        self.calls.append((func, *given))
        number = self.operands.get(id(args[0])) if args else None
        self._casting &= func is aten._to_copy.default and number is not None
        if self._casting and number is not None:
            self.casts[number] = result.dtype
        return result


def _run(
    op: OpOverload,
    leaves: Sequence[Any],
    structure: pytree.TreeSpec,
    dtype: torch.dtype | None = None,
) -> _Watch:
    """The call on copies of its operands, unrecorded; none is a leaf whose cast would be cached."""
    with disable_proxy_modes_tracing(), torch.no_grad():
        operands = [_copy(x, dtype) if isinstance(x, torch.Tensor) else x for x in leaves]
        watch = _Watch(operands)
        args, kwargs = pytree.tree_unflatten(operands, structure)
        try:
            with watch:
                results = op(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            results = ()  # the call itself will say so
    watch.results = {x.dtype for x in pytree.tree_leaves(results) if isinstance(x, torch.Tensor)}
    return watch


def _copy(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return x.detach().to(dtype) if dtype is not None and _is_castable(x) else x.detach()
