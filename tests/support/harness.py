"""Compares a model under ringfx with the unsplit original, on every rank.

The oracle is the stock model in eager mode, run whole on each rank, in float32 or float64. What is
compared: every output tensor, buffers and inputs as the call left them, the loss, and the gradient
of *every* parameter (and of inputs that require one). A gradient g agrees with the oracle's g* to

    max|g - g*|  <=  tolerance * max(max|g*|, 1e-4 * G),    G = the largest max|g*| of any parameter

The floor is there because some gradients (a key's bias, say) are zero in theory and noise in
floating point. A gradient that exists on one side only counts as infinitely wrong, and so does NaN.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from ringfx.split_tensor.tensor import SplitTensor
from tests.support.ranks import RankError, RankPool, error_text, raises

__all__ = [
    "Case",
    "Comparison",
    "RankDifference",
    "RankError",
    "RankPool",
    "compare",
    "compare_all",
    "compare_here",
    "error_text",
    "gradient_differences",
    "raises",
]

ModelFactory: TypeAlias = Callable[[], nn.Module]
InputsFactory: TypeAlias = Callable[[], Mapping[str, Any] | Sequence[Any]]
LossFunction: TypeAlias = Callable[[Any], torch.Tensor]

GRADIENT_FLOOR = 1e-4
TOLERANCES: Mapping[torch.dtype, tuple[float, float]] = {
    #               loss   gradients and outputs
    torch.float32: (1e-6, 1e-4),
    torch.float64: (1e-10, 1e-10),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """One model on one input under one setting; everything importable, so that it can travel.

    ``inputs`` returns keyword arguments (a mapping) or positional ones; floating inputs are cast to
    ``dtype`` like the model. ``loss`` maps the model's output to a scalar; by default it is
    ``output.loss``. ``backward=False`` compares outputs only, without grad. ``optimize`` stands in
    for ``ringfx.optimize`` where the harness itself is tested.
    """

    model: ModelFactory
    inputs: InputsFactory
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``ringfx.optimize``."""
    loss: LossFunction | None = None
    backward: bool = True
    steps: int = 1
    """Calls in a row on the same weights; the differences are those of the last call."""
    label: str = ""
    optimize: Callable[..., nn.Module] | None = None


@dataclass(frozen=True, kw_only=True)
class RankDifference:
    """How far one rank's results are from the oracle's, as relative numbers."""

    rank: int
    loss: float
    outputs: Mapping[str, float]
    gradients: Mapping[str, float]
    strategies: tuple[str, ...]
    plan: str

    @property
    def worst_output(self) -> tuple[str, float]:
        return _worst(self.outputs)

    @property
    def worst_gradient(self) -> tuple[str, float]:
        return _worst(self.gradients)

    def __str__(self) -> str:
        output, gradient = self.worst_output, self.worst_gradient
        return (
            f"rank {self.rank}: loss {self.loss:.1e}; outputs {output[1]:.1e} ({output[0]}); "
            f"gradients {gradient[1]:.1e} ({gradient[0]}, worst of {len(self.gradients)})"
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The differences of all ranks for one case."""

    label: str
    dtype: torch.dtype
    ranks: tuple[RankDifference, ...]

    @property
    def loss(self) -> float:
        return max(rank.loss for rank in self.ranks)

    @property
    def output(self) -> float:
        return max(rank.worst_output[1] for rank in self.ranks)

    @property
    def gradient(self) -> float:
        return max(rank.worst_gradient[1] for rank in self.ranks)

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategy of each attention, which must be the same on all ranks."""
        assert len({rank.strategies for rank in self.ranks}) == 1, self.ranks
        return self.ranks[0].strategies

    def check(
        self,
        *,
        loss: float | None = None,
        gradients: float | None = None,
        outputs: float | None = None,
    ) -> Comparison:
        """Asserts the tolerances (by default those of the dtype, see TOLERANCES)."""
        default_loss, default_rest = TOLERANCES[self.dtype]
        bounds = (
            (self.loss, default_loss if loss is None else loss),
            (self.output, default_rest if outputs is None else outputs),
            (self.gradient, default_rest if gradients is None else gradients),
        )
        wrong = any(not value <= bound for value, bound in bounds)
        assert not wrong, f"{self}\nallowed: loss, outputs, gradients {[b for _, b in bounds]}"
        return self

    def __str__(self) -> str:
        return "\n  ".join((self.label or "case", *map(str, self.ranks)))


def compare(
    model_factory: ModelFactory,
    inputs_factory: InputsFactory,
    *,
    pool: RankPool,
    dtype: torch.dtype = torch.float32,
    optimize_kwargs: Mapping[str, Any] | None = None,
    loss_fn: LossFunction | None = None,
    **case: Any,
) -> Comparison:
    """One case on all ranks of a pool; see Case for the further fields."""
    one = Case(
        model=model_factory,
        inputs=inputs_factory,
        dtype=dtype,
        options=optimize_kwargs or {},
        loss=loss_fn,
        **case,
    )
    return compare_all(pool, [one])[0]


def compare_all(pool: RankPool, cases: Sequence[Case]) -> list[Comparison]:
    """Many cases in one call of the pool: a call costs a new process group."""
    by_rank = pool.run(_compare_cases, tuple(cases))
    return [
        Comparison(label=case.label, dtype=case.dtype, ranks=ranks)
        for case, ranks in zip(cases, zip(*by_rank, strict=True), strict=True)
    ]


def compare_here(case: Case) -> Comparison:
    """The case in this process, without ranks."""
    return Comparison(label=case.label, dtype=case.dtype, ranks=(_compare_case(case),))


def gradient_differences(
    ours: Mapping[str, torch.Tensor | None],
    oracle: Mapping[str, torch.Tensor | None],
    floor: float = GRADIENT_FLOOR,
) -> dict[str, float]:
    """Relative difference of each gradient, by the definition in the module's header."""
    assert ours.keys() == oracle.keys(), set(ours) ^ set(oracle)
    largest = max((_magnitude(g) for g in oracle.values() if g is not None), default=0.0)
    return {name: _difference(ours[name], oracle[name], floor * largest) for name in oracle}


@dataclass(frozen=True, eq=False)
class _Outcome:
    outputs: Mapping[str, torch.Tensor]
    loss: torch.Tensor | None
    gradients: Mapping[str, torch.Tensor | None]


def _compare_cases(cases: Sequence[Case]) -> list[RankDifference]:
    return [_compare_case(case) for case in cases]


def _compare_case(case: Case) -> RankDifference:
    # A case must not see what an earlier one compiled, nor draw other weights for it.
    torch._dynamo.reset()
    torch.manual_seed(0)
    stock = case.model().to(case.dtype)
    model = copy.deepcopy(stock)
    inputs = _cast(case.inputs(), case.dtype)
    optimized = (case.optimize or _ringfx_optimize())(model, **case.options)
    try:
        oracle = _outcome(case, stock, stock, inputs)
        ours = _outcome(case, optimized, model, inputs)
    except Exception as error:
        error.add_note(f"in case {case.label or case.options}")
        raise
    plan = getattr(optimized, "plan", None)
    return RankDifference(
        rank=dist.get_rank() if dist.is_initialized() else 0,
        loss=0.0 if oracle.loss is None else _difference(ours.loss, oracle.loss, 0.0),
        outputs=_output_differences(ours.outputs, oracle.outputs),
        gradients=gradient_differences(ours.gradients, oracle.gradients),
        strategies=tuple(layer.strategy for layer in getattr(plan, "layers", ())),
        plan=str(plan),
    )


def _ringfx_optimize() -> Callable[..., nn.Module]:
    import ringfx

    optimize: Callable[..., nn.Module] = ringfx.optimize
    return optimize


def _outcome(case: Case, call: nn.Module, owner: nn.Module, inputs: Any) -> _Outcome:
    """Runs ``call``; gradients are read from ``owner``'s parameters and from the inputs."""
    for _ in range(case.steps):
        owner.zero_grad(set_to_none=True)
        leaves = _fresh_leaves(inputs)
        with torch.set_grad_enabled(case.backward):
            output = call(**leaves) if isinstance(leaves, Mapping) else call(*leaves)
            loss = case.loss(output) if case.loss else getattr(output, "loss", None)
        if case.backward:
            assert loss is not None, "the output has no loss and the case gives no loss function"
            loss.backward()
    outputs = _touched(output) | _written(owner, leaves)
    return _Outcome(outputs, _plain(loss), _gradients(owner, leaves))


def _fresh_leaves(inputs: Any) -> Any:
    """Copies, so that a gradient or an in-place change of one run is not seen by the other."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad)

    return pytree.tree_map(fresh, inputs)


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().to(dtype).requires_grad_(value.requires_grad)
        return value

    return pytree.tree_map(cast, inputs)


def _gradients(owner: nn.Module, inputs: Any) -> dict[str, torch.Tensor | None]:
    found = {name: _plain(p.grad) for name, p in owner.named_parameters() if p.requires_grad}
    for path, value in pytree.tree_leaves_with_path(inputs):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            found[f"input{pytree.keystr(path)}"] = _plain(value.grad)
    return found


def _touched(output: Any) -> dict[str, torch.Tensor]:
    """Every tensor of an output, read as a user would: a split one is gathered by the touch."""
    found: dict[str, torch.Tensor] = {}
    for path, value in pytree.tree_leaves_with_path(output):
        if isinstance(value, torch.Tensor):
            found[f"output{pytree.keystr(path)}"] = _plain(value)  # type: ignore[assignment]
    return found


def _written(owner: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    """Buffers and inputs as the call left them: a model may write into both."""
    found = {f"buffer {name}": value for name, value in owner.named_buffers()}
    for path, value in pytree.tree_leaves_with_path(inputs):
        if isinstance(value, torch.Tensor):
            found[f"input{pytree.keystr(path)}"] = value
    return {name: _plain(value) for name, value in found.items()}  # type: ignore[misc]


def _plain(value: torch.Tensor | None) -> torch.Tensor | None:
    """An ordinary copy in float64, whatever tensor subclass the value was."""
    if value is None:
        return None
    with torch.no_grad():
        copied = value.detach().clone()
        if isinstance(copied, SplitTensor):  # a copy of a split output is split: read it
            copied = copied.whole()
    assert type(copied) is torch.Tensor, f"a touched value stayed {type(copied).__name__}"
    return copied.to(torch.complex128 if copied.is_complex() else torch.float64)


def _output_differences(
    ours: Mapping[str, torch.Tensor], oracle: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    assert ours.keys() == oracle.keys(), f"different outputs: {set(ours) ^ set(oracle)}"
    return {name: _difference(ours[name], oracle[name], 0.0) for name in oracle}


def _difference(ours: torch.Tensor | None, oracle: torch.Tensor | None, floor: float) -> float:
    """max|ours - oracle| / max(max|oracle|, floor); infinite where they cannot be compared."""
    if ours is None or oracle is None:
        return 0.0 if ours is oracle else math.inf
    if ours.shape != oracle.shape:
        return math.inf
    # An infinity on both sides (a masked logit) is agreement; inf - inf would be NaN.
    distance = _magnitude(torch.where(ours == oracle, 0.0, ours - oracle))
    if distance == 0.0:
        return 0.0
    scale = max(_magnitude(oracle), floor)
    relative = distance / scale if scale > 0.0 else math.inf
    return math.inf if math.isnan(relative) else relative


def _magnitude(value: torch.Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _worst(differences: Mapping[str, float]) -> tuple[str, float]:
    return max(differences.items(), key=lambda item: item[1], default=("none", 0.0))
