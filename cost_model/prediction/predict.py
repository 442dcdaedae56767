"""What one attention costs under a strategy: its formulas, with the kernels that take least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from ringfx.cost_model.prediction.footprint import (
    Calls,
    gradient_moments,
    output_moments,
    sums_backward,
    sums_forward,
)
from ringfx.cost_model.prediction.formulas import Phase, whole_seconds
from ringfx.cost_model.prediction.kernel_choice import picks
from ringfx.cost_model.prediction.profile import LOCAL, Profile
from ringfx.cost_model.prediction.profile_rows import Direction
from ringfx.cost_model.prediction.rank_share import Local, local_share
from ringfx.cost_model.prediction.strategy import Strategy
from ringfx.cost_model.prediction.terms import (
    copy_seconds,
    handling_seconds,
    kernel_seconds,
)
from ringfx.cost_model.prediction.work import Work, whole_work
from ringfx.errors import ProfileError
from ringfx.ir.kernel_table import KernelChoice, Pick
from ringfx.ir.values import AttentionSite

__all__ = ["Prediction", "held_bytes", "predict"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Time and memory of one attention under one strategy, on the slowest rank."""

    strategy: str
    kernel: str
    """``KernelChoice.text``: the fastest that admit it."""
    forward: Phase
    backward: Phase
    """All zero where nothing trains."""
    saved_bytes: int
    workspace_bytes: int
    result_bytes: int = 0
    """Of the saved bytes those of the output and its logsumexp."""
    output_bytes: int = 0
    """Of these those of the output."""
    own_queries: bool = True
    gloss: str = ""
    """Both as the strategy says."""
    head_groups: int = 0
    """Groups of heads that were asked for; 0: as many as the strategy takes by itself."""
    recomputed: bool = False
    """Whether backward computes its layer again."""
    attention_again: bool = False
    """Whether its attention is run again too."""
    again_ms: float = 0.0
    """What that takes."""
    layer_bytes: int = 0
    """What its layer keeps outside attention."""
    offloaded: bool = False
    """Whether what its layer hands on, and its output, wait in the host's memory for backward."""
    host_bytes: int = 0
    """What does."""
    host_result_bytes: int = 0
    """Of it the output of attention."""
    offload_ms: float = 0.0
    """What sending it there and back takes."""

    @property
    def strategy_words(self) -> str:
        """The strategy as people read it: ``production (overlapped ring)``."""
        return f"{self.strategy} ({self.gloss})" if self.gloss else self.strategy

    @property
    def forward_ms(self) -> float:
        return 1e3 * self.forward.total_s

    @property
    def backward_ms(self) -> float:
        return 1e3 * self.backward.total_s

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms

    @property
    def cost_ms(self) -> float:
        """With what is computed again or offloaded: what choices compare."""
        return self.total_ms + self.again_ms + self.offload_ms

    @property
    def compute_ms(self) -> float:
        return 1e3 * (self.forward.compute_s + self.backward.compute_s)

    @property
    def communication_ms(self) -> float:
        return 1e3 * (self.forward.communication_s + self.backward.communication_s)

    @property
    def exposed_ms(self) -> float:
        return 1e3 * (self.forward.exposed_s + self.backward.exposed_s)


def predict(
    site: AttentionSite, strategy: Strategy, world_size: int, profile: Profile
) -> Prediction:
    """Time and memory of one attention under one strategy over ``world_size`` ranks."""
    local = replace(local_share(site, world_size), head_groups=strategy.head_groups)
    if strategy.whole_queries and world_size > 1:
        local = replace(local, q_len=site.q_len)
    if profile.kind == "observed":
        return _observed(local, profile, strategy)
    directions: tuple[Direction, ...] = ("forward", "backward") if site.trains else ("forward",)
    held = {direction: held_bytes(local, strategy, direction) for direction in directions}
    kernels, forward, backward = _fastest(local, profile, strategy, held)
    return Prediction(
        strategy=strategy.name,
        kernel=kernels.text,
        forward=forward,
        backward=backward,
        saved_bytes=local.saved_bytes,
        result_bytes=local.result_bytes,
        output_bytes=local.output_bytes,
        workspace_bytes=_workspace_bytes(local, held),
        own_queries=strategy.own_queries,
        gloss=strategy.gloss,
        head_groups=strategy.head_groups,
    )


Held: TypeAlias = Mapping[Direction, int]
"""What each direction holds: ``held_bytes``."""


def _fastest(
    local: Local, profile: Profile, strategy: Strategy, held: Held
) -> tuple[KernelChoice, Phase, Phase]:
    """The kernels that take least time, forward and backward, and how long."""
    forwards = _phases(local, profile, strategy, "forward", held)
    if not local.site.trains:
        phase, pick = min(forwards, key=_order)
        return KernelChoice(forward=pick, backward=pick), phase, Phase()
    backwards = _phases(local, profile, strategy, "backward", held)
    able = [
        (there, back, choice)
        for there, forward in forwards
        for back, backward in backwards
        if (choice := KernelChoice(forward=forward, backward=backward)).can_run_together
    ]
    there, back, choice = min(able, key=lambda row: _order((row[0] + row[1], None)))
    return choice, there, back


def _order(row: tuple[Phase, object]) -> tuple[float, float]:
    """What hides behind messages is less all the same."""
    return row[0].total_s, row[0].compute_s


def _phases(
    local: Local, profile: Profile, strategy: Strategy, direction: Direction, held: Held
) -> list[tuple[Phase, Pick]]:
    """For each kernel: the strategy's formula, or the local kernel's, and what any layer costs."""
    is_split = local.world_size > 1
    formula = partial(_split_seconds, strategy) if is_split else _local_kernel
    layer_us = profile.overhead_us(strategy.name if is_split else LOCAL, direction)
    buffers_s = _buffer_seconds(local, profile, strategy, direction, held)
    any_layer = Phase(compute_s=layer_us / 1e6 + buffers_s)
    return [
        (formula(local, profile, direction, pick) + any_layer, pick)
        for pick in picks(local.site, strategy, profile, direction)
    ]


def _local_kernel(local: Local, profile: Profile, direction: Direction, pick: Pick) -> Phase:
    """One rank: the strategy's kernel over the whole sequence, and nothing is sent."""
    return Phase(compute_s=whole_seconds(local, profile, pick, direction))


def _split_seconds(
    strategy: Strategy, local: Local, profile: Profile, direction: Direction, pick: Pick
) -> Phase:
    """The strategy's formula; of a dilated attention for one part after the other."""
    if not strategy.own_queries:
        return strategy.time(local, profile, direction, pick)
    found = Phase()
    for times, part in local.parts:
        found = found + strategy.time(part, profile, direction, pick).times(times)
    return found


def _buffer_seconds(
    local: Local, profile: Profile, strategy: Strategy, direction: Direction, held: Held
) -> float:
    """What a layer's buffers cost beside its kernels, messages and merges.

    Those of a dilated attention are made for each part, whose results are added to those before.
    """
    if not local.site.spec.branches:
        return handling_seconds(profile, held[direction])
    made = sums_forward(local) if direction == "forward" else sums_backward(local)
    moved = 0
    for number, (times, part) in enumerate(local.parts):
        made += times * (_held(part, strategy, direction) + _taken_rows(part, direction))
        if number or not part.keeps_all_of(local):
            moved += times * _added_bytes(part, direction)
    return handling_seconds(profile, made) + copy_seconds(profile, moved)


def _added_bytes(part: Local, direction: Direction) -> int:
    """Read and written where a part is added: an output is scaled first, a gradient is not."""
    if direction == "forward":
        return 5 * part.out_items * part.accumulator_bytes
    return 3 * (part.q_items + part.kv_items) * part.accumulator_bytes


def _workspace_bytes(local: Local, held: Held) -> int:
    """Bytes beyond q, k, v, the output, its logsumexp and the gradients that are handed over.

    Forward, the gradients' bytes are free for it as well: they come only later.
    """
    made = local.out_items * local.itemsize + local.rows * local.accumulator_bytes
    forward = held["forward"] - made
    if "backward" not in held:
        return max(0, forward)
    handed = (local.q_items + local.kv_items) * local.itemsize
    return max(0, forward - handed, held["backward"] - handed)


def held_bytes(local: Local, strategy: Strategy, direction: Direction) -> int:
    """Bytes of buffers and results that one direction holds at most."""
    if not local.site.spec.branches or not (strategy.own_queries or local.world_size == 1):
        return _held(local, strategy, direction)
    sums = sums_forward(local) if direction == "forward" else sums_backward(local)
    parts = [part for _, part in local.parts]
    held = [_held(part, strategy, direction) for part in parts]
    moments = [
        sums + bytes_ + _taken_rows(part, direction)
        for bytes_, part in zip(held, parts, strict=True)
    ]
    if parts and parts[0].keeps_all_of(local):
        moments[0] = held[0]  # its sums go on as those of all parts
    return max(moments, default=sums)


def _held(local: Local, strategy: Strategy, direction: Direction) -> int:
    """What the strategy's own formula says, of a part or of an attention without branches."""
    formula = strategy.memory if local.world_size > 1 else _local_moments
    math = strategy.math_only or local.site.spec.needs_scores
    return max(formula(local, Calls(local=local, direction=direction, math=math)))


def _taken_rows(part: Local, direction: Direction) -> int:
    """Bytes of the kept rows of q, k, v, and in backward of the output and its gradient.

    Rows at even distances are views.
    """
    if part.is_one_run:
        return 0
    there = part.q_items + part.kv_items
    more = 2 * part.out_items if direction == "backward" else 0
    return (there + more) * part.itemsize


def _local_moments(local: Local, calls: Calls) -> Iterator[int]:
    """Forward (o + r) a and the call, backward (q + kv) a and the call."""
    call = calls.of((whole_work(local.site.spec),), 1)
    if calls.direction == "forward":
        yield from output_moments(local)
        yield sums_forward(local) + call
    else:
        yield sums_backward(local) + call
        yield from gradient_moments(local)


def _observed(local: Local, profile: Profile, strategy: Strategy) -> Prediction:
    """A whole strategy of other code, as its records show it; one rank, forward.

    forward     F w / rate             the reference kernel computes masked pairs too
    workspace   base + tensors * bytes(q) + scores * bytes(b h n^2)
    """
    if local.world_size > 1 or local.site.trains:
        raise ProfileError(
            f"profile {profile.name!r} was observed forward on one rank: it has no figures for "
            "backward or communication. Do: plan with another profile, such as one from `ringfx "
            "calibrate`."
        )
    row = next((row for row in profile.memory if row.strategy == strategy.name), None)
    if row is None:
        raise ProfileError(
            f"profile {profile.name!r} has no memory row for {strategy.name!r}. Do: use one of "
            f"{', '.join(row.strategy for row in profile.memory) or 'another profile'}."
        )
    rows = local.site.q_len * local.site.kv_len
    work = Work(calls=1, pairs=rows * (1.0 if strategy.math_only else local.site.density))
    scores = local.site.batch * local.site.heads * rows * local.itemsize
    needed = row.base_bytes + row.tensors * local.q_items * local.itemsize + row.scores * scores
    seconds = kernel_seconds(profile, Pick(strategy.name), local.site, work, "forward")
    return Prediction(
        strategy=strategy.name,
        kernel=strategy.name,
        forward=Phase(compute_s=seconds),
        backward=Phase(),
        saved_bytes=0,
        workspace_bytes=round(needed),
        own_queries=strategy.own_queries,
        gloss=strategy.gloss,
    )
