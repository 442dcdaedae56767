"""Time steps of a small model without attention, as training runs them.

Operators that are timed alone find what they read in a cache, and their results' memory at hand. In
a step they do not. How much longer a step takes than the rates of its operators say is a factor of
the machine; it is measured on a model that is like others in kind: an embedding, norms, projections
to rotated heads and back, MLPs, a vocabulary and a loss.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ringfx.cost_model.calibration.measure import Effort, synchronise
from ringfx.cost_model.peak_memory.liveness import values_of
from ringfx.cost_model.peak_memory.timeline_of import num_bytes
from ringfx.cost_model.prediction.operators import PASSES, seconds
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.step_time.operator_work import works
from ringfx.torch_compat.dynamo import BackendCompilerFailed

__all__ = ["SmallModel", "StepTimes", "given_tokens", "predicted_ms", "step_times"]

WIDTH, INNER, LAYERS, VOCABULARY, HEADS = 320, 1280, 3, 8192, 5
MORE_ON_A_GPU = 8
"""Times as many tokens, and as wide: a small model does not fill one."""
WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Milliseconds of forward and backward for so many tokens, by how they are compiled."""

    tokens: tuple[int, ...]
    eager_ms: tuple[float, ...]
    fused_ms: tuple[float, ...] | None
    """None: Inductor cannot compile here, or it was not asked."""
    optimizer_gbytes_per_s: float
    """What a step of AdamW reads and writes, behind a backward."""


class SmallModel(nn.Module):
    """A few layers without attention, and a loss over all tokens."""

    def __init__(self, device: str) -> None:
        super().__init__()
        more = _more(device)
        width, inner = more * WIDTH, more * INNER
        self.embed = nn.Embedding(VOCABULARY, width)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(LAYERS))
        self.heads = nn.ModuleList(nn.Linear(width, 2 * width, bias=False) for _ in range(LAYERS))
        self.back = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(LAYERS))
        self.up = nn.ModuleList(nn.Linear(width, inner) for _ in range(LAYERS))
        self.down = nn.ModuleList(nn.Linear(inner, width, bias=False) for _ in range(LAYERS))
        self.angles = nn.Buffer(torch.linspace(0, 1, width // HEADS))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        angles = torch.arange(len(tokens), device=x.device)[:, None] * self.angles
        cos, sin = angles.cos(), angles.sin()
        layers = zip(self.scales, self.heads, self.back, self.up, self.down, strict=True)
        for scale, heads, back, up, down in layers:
            q, k = heads(F.layer_norm(x, x.shape[-1:])).view(len(x), 2, HEADS, -1).unbind(1)
            q, k = (_rotated(y.transpose(0, 1), cos, sin) for y in (q, k))
            x = x + back((q + k).transpose(0, 1).reshape(len(x), -1))
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale
            x = x + down(F.silu(up(normed)))
        return F.cross_entropy(self.head(self.norm(x)), labels)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _more(device: str) -> int:
    return 1 if device == "cpu" else MORE_ON_A_GPU


def given_tokens(tokens: int, device: str) -> Tensor:
    """Tokens, and labels; on a GPU more of them."""
    count = tokens * _more(device)
    return torch.arange(count, device=device) * 7919 % VOCABULARY


def step_times(device: str, effort: Effort) -> StepTimes:
    model = SmallModel(device).to(device)
    tokens = (effort.operator_tokens // 4, effort.operator_tokens)
    eager = [_steps(model, model, n, device, effort) for n in tokens]
    fused = _fused(model, tokens, device, effort) if effort.compiled else None
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    took_ms = statistics.median(ms for _, ms in eager)
    return StepTimes(
        tokens=tokens, eager_ms=tuple(ms for ms, _ in eager), fused_ms=fused,
        optimizer_gbytes_per_s=PASSES["adamw"] * size / took_ms / 1e6,
    )  # fmt: skip


def _fused(
    model: nn.Module, tokens: Sequence[int], device: str, effort: Effort
) -> tuple[float, ...] | None:
    compiled = torch.compile(model, dynamic=False, fullgraph=True)
    try:
        return tuple(_steps(model, compiled, n, device, effort)[0] for n in tokens)
    except BackendCompilerFailed:
        return None


def _steps(
    model: nn.Module, call: Callable[..., Tensor], tokens: int, device: str, effort: Effort
) -> tuple[float, float]:
    """Milliseconds of forward and backward, and of the optimizer's step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    given = given_tokens(tokens, device)
    times: list[tuple[float, float]] = []
    begun = time.perf_counter()
    while (
        len(times) < WARM_UP + max(3, effort.min_repeats)
        or time.perf_counter() - begun < effort.seconds_per_case
    ):
        synchronise(device)
        start = time.perf_counter()
        call(given, given).backward()
        synchronise(device)
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        synchronise(device)
        times.append((1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)))
    steps, updates = zip(*times[WARM_UP:], strict=True)
    return statistics.median(steps), statistics.median(updates)


def predicted_ms(profile: Profile, tokens: Sequence[int], *, fused: bool) -> tuple[float, ...]:
    """What the rates of a profile say of forward and backward, for each number of tokens."""
    return tuple(_predicted_ms(profile, n, fused) for n in tokens)


def _predicted_ms(profile: Profile, tokens: int, fused: bool) -> float:
    traced, num_parameters = _traced(tokens, profile.device)
    inputs = traced.graph.find_nodes(op="placeholder")
    trained = {n: 0 < i <= num_parameters for i, n in enumerate(inputs)}
    values = values_of(traced.graph, num_bytes, trained)
    found = works(values, lambda node: 1.0, fused=fused).values()
    return 1e3 * sum(
        seconds(profile, x.forward, "forward") + seconds(profile, x.backward, "backward")
        for x in found
    )


def _traced(tokens: int, device: str) -> tuple[GraphModule, int]:
    """The model's program, of which no number is computed: of tokens, parameters and a buffer."""
    with torch.device("meta"):
        model = SmallModel(device)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def run(tokens: Tensor, *given: Tensor) -> Tensor:
        states = dict(zip([*parameters, *buffers], given, strict=True))
        found: Tensor = torch.func.functional_call(model, states, (tokens, tokens))
        return found

    trace: Callable[..., GraphModule] = make_fx(run, tracing_mode="fake")
    made = torch.empty(tokens * _more(device), dtype=torch.int64, device="meta")
    with torch.no_grad():
        return trace(made, *parameters.values(), *buffers.values()), len(parameters)
