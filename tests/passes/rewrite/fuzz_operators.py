"""Every public function of torch between a model's projection and its attention, at edge points.

    python -m tests.passes.rewrite.fuzz_operators --ranks 2 [--only NAME]

What torch lets others override is called in every way of ``WAYS`` that eager mode takes, on
ordinary numbers and on rows of zeros, ties, kinks, saturation, subnormal and large numbers. The
split program has eager mode's values and, where those are finite, its gradients; or it is refused
by a ``RingfxError``. Any other exception is a defect.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import get_overridable_functions
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ringfx.comm.world import World
from ringfx.compile.pipeline import lower
from ringfx.compile.settings import Settings
from ringfx.errors import RingfxError
from ringfx.passes.capture.definitions import DEFINITIONS
from ringfx.passes.verify.check import line_inputs
from tests.models.composed import COMPOSED, DRAWS
from tests.passes.rewrite.virtual_ranks import run_on_ranks
from tests.support.direct import called

__all__ = ["Trial", "check", "trials"]

Tensor = torch.Tensor
BATCH, TOKENS, WIDTH = 3, 7, 8
BETWEEN = getattr(torch.ops.aten.random_, "from")
"""Dynamo calls it as a method; make_fx alone would write its name, which is a keyword."""
TOGETHER = 32
"""Trials in one program."""
UNBOUNDED = 1e12
"""A gradient beyond it is of a point where there is none, as of equal singular values."""
SUBNORMAL, LARGE = 5e-324, 800.0  # exp(LARGE) is infinite

ROWS = (
    [0.0] * WIDTH,
    [0.0, -0.0] * (WIDTH // 2),
    [-3.0, -1.0, -0.5, 0.5, 1.0, 3.0, 6.0, 2.0],
    [1.0] * WIDTH,
    [1.0] * WIDTH,
    [LARGE, -LARGE, 40.0, -40.0, 1.0, 1.0, 0.0, 2.0],
    [SUBNORMAL, -SUBNORMAL, 0.3, 0.3, -0.3, 0.7, -0.0, 1.0],
)


def _numbers() -> Tensor:
    """Ordinary ones, then edges in two orders: padding takes the first rows again."""
    generator = torch.Generator().manual_seed(1)
    ordinary = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    edges = torch.tensor(ROWS, dtype=torch.float64)
    return torch.stack([ordinary, edges, edges.flip(0)])


def _chances() -> Tensor:
    ordinary, *edges = _numbers()
    return torch.stack([ordinary.sigmoid(), *(x.clamp(0, 1) for x in edges)])


INPUTS: Mapping[str, Callable[[], Tensor]] = {"numbers": _numbers, "chances": _chances}

WAYS: Mapping[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "h": lambda f, h, w: f(h),
    "h, number": lambda f, h, w: f(h, 0.5),
    "h, two": lambda f, h, w: f(h, 2),
    "h, width": lambda f, h, w: f(h, -1),
    "h, tokens": lambda f, h, w: f(h, 1),
    "h, none, width": lambda f, h, w: f(h, None, -1),
    "h, two, width": lambda f, h, w: f(h, 2, -1),
    "h, two, tokens": lambda f, h, w: f(h, 2, 1),
    "h, sizes": lambda f, h, w: f(h, (WIDTH,)),
    "h, both": lambda f, h, w: f(h, (1, 2)),
    "h, dims": lambda f, h, w: f(h, 0, 1),
    "h, dim=width": lambda f, h, w: f(h, dim=-1),
    "h, dim=tokens": lambda f, h, w: f(h, dim=1),
    "h, weight": lambda f, h, w: f(h, w),
    "h, row": lambda f, h, w: f(h, h[:, :1]),
    "h, moved": lambda f, h, w: f(h, h.roll(1, -1)),
    "h, moved tokens": lambda f, h, w: f(h, h.roll(1, 1)),
    "h, h, h": lambda f, h, w: f(h, h.roll(1, -1), h.flip(-1)),
    "h, h, h, h": lambda f, h, w: f(h, h.roll(1, -1), h.flip(-1), h),
    "h, h transposed": lambda f, h, w: f(h, h.mT),
    "list": lambda f, h, w: f([h, h.roll(1, -1)]),
    "list, tokens": lambda f, h, w: f([h, h.roll(1, -1)], 1),
    "h, constant": lambda f, h, w: f(h, h.detach().roll(1, 1)),
    "h, signs": lambda f, h, w: f(h, _signs(h)),
    "h, h, signs": lambda f, h, w: f(h, h.roll(1, 1), _signs(h)),
    "h, h, signs of rows": lambda f, h, w: f(
        h.flatten(0, 1), h.roll(1, 1).flatten(0, 1),
        _signs(h[..., 0].flatten()),
    ),
    "h, mask": lambda f, h, w: f(h, h.detach() > 0),
    "h, mask, number": lambda f, h, w: f(h, h.detach() > 0, 0.5),
    "mask, h, h": lambda f, h, w: f(h.detach() > 0, h, h.roll(1, -1)),
    "mask": lambda f, h, w: f(h > 0),
    "masks": lambda f, h, w: f(h > 0, h.roll(1, -1) > 0),
    "whole numbers": lambda f, h, w: f(_whole(h)),
    "two of whole numbers": lambda f, h, w: f(_whole(h), _whole(h).roll(1, 1)),
    "h, width, indices": lambda f, h, w: f(h, -1, _whole(h)),
    "h, tokens, indices": lambda f, h, w: f(h, 1, _whole(h) % TOKENS),
    "h, width, few": lambda f, h, w: f(h, -1, torch.arange(3) % 2),
    "h, tokens, few": lambda f, h, w: f(h, 1, torch.arange(3) % 2),
    "h, width, few, h": lambda f, h, w: f(h, -1, torch.arange(3) % 2, h[..., :3]),
    "h, tokens, few, h": lambda f, h, w: f(h, 1, torch.arange(3) % 2, h[:, :3]),
    "h, width, indices, h": lambda f, h, w: f(h, -1, _whole(h), h.flip(-1)),
    "transposed": lambda f, h, w: f(h.mT),
    "transposed, two": lambda f, h, w: f(h.mT, 2),
    "transposed, labels": lambda f, h, w: f(h.mT, _whole(h)[..., 0]),
    "rows, labels": lambda f, h, w: f(h.flatten(0, 1), _whole(h)[..., 0].flatten()),
    "rows": lambda f, h, w: f(h.flatten(0, 1)),
    "rows, rows": lambda f, h, w: f(h.flatten(0, 1), h.roll(1, -1).flatten(0, 1)),
    "row": lambda f, h, w: f(h[:, 0]),
    "first, first": lambda f, h, w: f(h[..., 0], h[..., 1]),
    "first sequence": lambda f, h, w: f(h[0]),
    "flat": lambda f, h, w: f(h.flatten()),
    "flat, flat": lambda f, h, w: f(h.flatten(), h.roll(1, -1).flatten()),
    "square": lambda f, h, w: f(_square(h)),
    "square, h": lambda f, h, w: f(_square(h), h.mT),
    "squares": lambda f, h, w: f(h.unflatten(-1, (2, 4))),
    "images": lambda f, h, w: f(h.unflatten(-1, (2, 4)), 2),
    "complex": lambda f, h, w: f(torch.complex(h, h.roll(1, -1))),
    "transposed, kernel": lambda f, h, w: f(h.mT, w.expand(4, WIDTH).unsqueeze(-1).repeat(1, 1, 3)),
    "h, matrix": lambda f, h, w: f(h, w.diag()),
    "h, matrix, weight": lambda f, h, w: f(h, w.diag(), w),
    "rows, matrix": lambda f, h, w: f(h.flatten(0, 1), w.diag()),
    "weight, rows, matrix": lambda f, h, w: f(w, h.flatten(0, 1), w.diag()),
    "h, low, high": lambda f, h, w: f(h, -0.5, 0.5),
    "h, from, to": lambda f, h, w: f(h, 1, 5),
    "transposed, w, w": lambda f, h, w: f(h.mT, w, w.square(), None, None, True),
    "h, sizes, weight": lambda f, h, w: f(h, (WIDTH,), w),
    "h, two, 1, width": lambda f, h, w: f(h, 2, 1, -1),
    "h, groups": lambda f, h, w: f(h.mT, 2),
    "h, pad": lambda f, h, w: f(h, (1, 2)),
    "h, pad tokens": lambda f, h, w: f(h, (0, 0, 1, 2)),
}  # fmt: skip
"""Words -> how a function f is called on hidden states h, with a weight w of a row's width."""


def _square(h: Tensor) -> Tensor:
    """Far from singular, and no two alike: how rounding is inverted or sorted is not asked."""
    h = h.tanh() * torch.linspace(0.8, 1.2, len(h), dtype=h.dtype)[:, None, None]
    return h.mT @ h + torch.eye(WIDTH, dtype=h.dtype)


def _signs(h: Tensor) -> Tensor:
    return h.detach().gt(0).to(h.dtype) * 2 - 1


def _whole(h: Tensor) -> Tensor:
    return h.detach().abs().clamp(max=50).long() % WIDTH


# Factors are not unique and eigenvalues have no order where rows are equal.
SKIPPED = re.compile(
    r"^(_|qr$|svd$|lu$|lu_factor|eigvals$|is_|set_|requires_grad|retain|register|backward|data_ptr|storage|untyped|pin|share_mem"
    r"|resize|swap_|numpy|tolist|item|cuda|xpu|ipu|cpu|hpu|mtia|module_load|dim_order|apply|map_"
    r"|empty|new_empty|get_|sparse|to_sparse|to_dense|to_mkldnn|fbgemm|quant|dequant|fake_quant"
    r"|fused_moving|int_repr|q_|cudnn|miopen|mkldnn|batch_norm_|names|rename|refine|align|detach_"
    r"|element_size|size$|stride$|nbytes|dim$|dtype|device|layout|type$|unsafe_|ctc|fill_diag"
    r"|record_stream|reinforce|has_names|ndim|grad|nelement|numel|slice_inverse|pca_|svd_low|result_type|can_cast|promote)|_$"
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One function of one namespace, called in one way on one kind of numbers."""

    space: str
    name: str
    way: str
    numbers: str

    def __str__(self) -> str:
        return f"{self.space}.{self.name}({self.way}) of {self.numbers}"

    def function(self) -> Callable[..., Any]:
        if self.space == "composed":
            return {**COMPOSED, **DRAWS}[self.name]
        found: Callable[..., Any] = getattr(SPACES[self.space], self.name)
        return found

    def call(self, h: Tensor, w: Tensor) -> Any:
        return WAYS[self.way](self.function(), h, w)


SPACES: Mapping[str, Any] = {
    "torch.nn.functional": F, "torch.special": torch.special, "torch.linalg": torch.linalg,
    "torch.fft": torch.fft, "torch": torch, "torch.Tensor": torch.Tensor,
}  # fmt: skip


def functions() -> Iterator[tuple[str, str]]:
    """Every function once; methods are there for what no function of that name does."""
    known = {f for found in get_overridable_functions().values() for f in found}
    seen: set[str] = set()
    for space, owner in SPACES.items():
        for name in sorted(dir(owner)):
            function = getattr(owner, name)
            public = callable(function) and not SKIPPED.search(name) and function in known
            if public and (name not in seen or space in ("torch.special", "torch.linalg")):
                seen.add(name)
                yield space, name


def trials(*, only: str = "", ways: int = len(WAYS)) -> Iterator[Trial]:
    """Every call that eager mode takes, each once that runs other operators."""
    seen: set[str] = set()
    for space, name in functions():
        left = ways
        for way in WAYS if only in ("", name) else ():
            trial = Trial(space=space, name=name, way=way, numbers="numbers")
            runs = what_runs(trial)
            if left and runs is not None and runs not in seen:
                seen.add(runs)
                left -= 1
                yield trial
                yield dataclasses.replace(trial, numbers="chances")


def what_runs(trial: Trial) -> str | None:
    """The operators of the call, if eager mode takes it and gets numbers."""
    h = INPUTS[trial.numbers]().requires_grad_()
    w = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64).requires_grad_()
    try:
        with _Record() as record:
            made = tensors(trial.call(h * 1.0, w))
        torch.autograd.grad(torch.stack([weighed(y) for y in made]).sum(), h, allow_unused=True)
    except Exception:  # whatever a function says of a call that is not for it
        return None
    return "; ".join(record.calls) if made and all(y.numel() < 10_000 for y in made) else None


class _Record(TorchDispatchMode):
    """Which operators run on what."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = pytree.tree_map(_shown, (args, kwargs or {}))
        self.calls.append(f"{func}{given}")
        return func(*args, **(kwargs or {}))


def _shown(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def tensors(made: Any) -> list[Tensor]:
    return [y for y in pytree.tree_leaves(made) if type(y) is Tensor and not y.is_sparse]


class Between(nn.Module):
    """A projection, each trial on its own rows of it, and attention over all of them.

    Gives for each trial a list of sums that weigh every element of its results; attention's first.
    """

    def __init__(self, trials: Sequence[Trial], *, after: bool = False) -> None:
        super().__init__()
        self.trials, self.after = trials, after
        n = len(trials)
        self.scale = nn.Parameter(torch.ones(n, 1, 1, WIDTH, dtype=torch.float64))
        self.gain = nn.Parameter(torch.ones(n, 1, 1, WIDTH, dtype=torch.float64))
        w = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64)
        self.w = nn.Parameter(w.repeat(n, 1))
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(3 * WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 3
        self.qkv = nn.Parameter(qkv)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        h = x * self.scale
        attended = self.attend(h) * self.gain
        given = _on_a_grid(attended) if self.after else h
        found = []
        for i, trial in enumerate(self.trials):
            made = tensors(trial.call(given[i], self.w[i]))
            found.append([weighed(attended[i]), *map(weighed, made)])
        return found

    def attend(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1).nan_to_num(0.0, 0.0, 0.0).clamp(-3, 3)
        parts = F.linear(x, self.qkv).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (2, WIDTH // 2)).transpose(1, 2) for y in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return y.unflatten(0, (len(self.trials), -1))


def _on_a_grid(x: Tensor) -> Tensor:
    """What rounding tells apart would be sorted one way by one rank and another way by none."""
    return x + ((x * 2**20).round() / 2**20 - x).detach()


def weighed(y: Tensor) -> Tensor:
    """One number that any element changes, infinite ones and NaN told apart."""
    y = torch.view_as_real(y) if y.is_complex() else y.double()
    number = torch.arange(y.numel(), dtype=torch.float64).view(y.shape)
    kinds = y.isnan() + 3.0 * y.isposinf() + 5.0 * y.isneginf()
    finite = y.nan_to_num(0.0, 0.0, 0.0).clamp(-1e6, 1e6)
    return ((finite + kinds.detach()) * number.cos()).sum()


@dataclass(frozen=True, kw_only=True)
class Results:
    """Sums by trial, and the gradients of the projection, the weights and the inputs."""

    sums: Sequence[Sequence[Tensor]]
    gradients: Sequence[Tensor]

    def of(self, i: int) -> Iterator[tuple[str, Tensor]]:
        for n, y in enumerate(self.sums[i]):
            yield f"result {n}", y
        for name, grad in zip(("scale", "gain", "w", "x"), self.gradients, strict=True):
            yield name, grad[i]


def results(call: Callable[..., Any], values: Sequence[Tensor]) -> Results:
    leaves = [v.detach().clone().requires_grad_() for v in values]
    torch.manual_seed(3)
    found = call(*leaves)
    total = torch.stack([y for sums in found for y in sums]).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    gradients = [
        torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
    ]
    scale, gain, w, _, x = gradients
    return Results(sums=[[y.detach() for y in z] for z in found], gradients=(scale, gain, w, x))


def split_results(
    graph: Any, values: Sequence[Tensor], ranks: int, counts: Sequence[int]
) -> Sequence[Results]:
    settings = Settings.of({"strategy": "collective", "on_unsupported": "gather"})
    program = lower(graph, values, settings, World(ranks, 0, "threads"))

    def run(rank: int, given: Sequence[Tensor]) -> list[list[Tensor]]:
        extra = line_inputs(program.local.placement.lines, rank, "cpu")
        with torch.fx.traceback.preserve_node_meta(False):
            found = iter(torch.fx.Interpreter(program.local.graph_module).run(*given, *extra))
        return [[next(found) for _ in range(n)] for n in counts]

    return run_on_ranks(ranks, lambda rank: results(lambda *given: run(rank, given), values))


def check(trials: Sequence[Trial], *, ranks: int = 2, after: bool = False) -> Iterator[str]:
    """For each trial ``equal``, ``refused: ...``, ``not traced`` or what is wrong."""
    said = _together(trials, ranks, after)
    if said is not None:
        yield from said
    else:
        half = len(trials) // 2
        yield from check(trials[:half], ranks=ranks, after=after)
        yield from check(trials[half:], ranks=ranks, after=after)


def _together(trials: Sequence[Trial], ranks: int, after: bool) -> list[str] | None:
    """None where one of several trials stops the others."""
    model = Between(trials, after=after)
    x = torch.stack([INPUTS[trial.numbers]() for trial in trials])
    values = [
        *(p.detach().clone().requires_grad_() for p in model.parameters()),
        x.requires_grad_(),
    ]

    def call(*given: Tensor) -> Any:
        return called(model, *given)

    def stops(text: str) -> list[str] | None:
        return [text] if len(trials) == 1 else None

    try:
        expected = results(call, values)
        torch.manual_seed(3)
        graph = make_fx(
            lambda *given: [y for z in call(*given) for y in z],
            decomposition_table={BETWEEN: DEFINITIONS[BETWEEN]},
            pre_dispatch=True,
        )(*values)
    except Exception as error:  # make_fx, not ringfx: shapes that depend on data
        return stops(f"not traced: {type(error).__name__}")
    try:
        found = split_results(graph, values, ranks, [len(sums) for sums in expected.sums])
    except RingfxError as error:
        return stops(f"refused: {type(error).__name__}: {str(error)[:200]}")
    except Exception as error:
        return stops(f"FAILED {type(error).__name__}: {str(error)[:300]}")
    wrong = [
        [w for ours in found for w in differences(ours, expected, i)] for i in range(len(trials))
    ]
    return [f"WRONG {each[0]}" if each else "equal" for each in wrong]


def differences(ours: Results, expected: Results, i: int) -> Iterator[str]:
    """What is not as in eager mode, where that is finite."""
    size = float(expected.gradients[-1][i].nan_to_num(0, 0, 0).abs().max().clamp(min=1.0))
    for (name, a), (_, b) in zip(ours.of(i), expected.of(i), strict=True):
        finite = b.isfinite() & (b.abs() < UNBOUNDED)
        a, b = a[finite], b[finite]
        left = 1e-9 * (size * LARGE if name in ("scale", "gain", "w") else 1.0)
        if not torch.allclose(a, b, rtol=1e-8, atol=left):
            worst = (a - b).abs().nan_to_num(float("inf")).argmax()
            yield f"{name}: {a[worst]:.6g} for {b[worst]:.6g}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--part", default="0/1", help="of the trials, as 0/4")
    parser.add_argument("--after", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    number, of = map(int, given.part.split("/"))
    counts: Counter[str] = Counter()
    chosen = list(trials(only=given.only))[number::of]
    for start in range(0, len(chosen), TOGETHER):
        some = chosen[start : start + TOGETHER]
        for trial, said in zip(
            some, check(some, ranks=given.ranks, after=given.after), strict=True
        ):
            counts[said.split(":")[0].split()[0]] += 1
            if said != "equal":
                print(f"{trial}: {said}", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
