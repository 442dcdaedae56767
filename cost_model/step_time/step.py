"""A step's time outside attention: the work of all operators at a profile's rates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from ringfx.comm.state_ranks import StateRanks
from ringfx.cost_model.peak_memory.liveness import Values, block_of, values_of
from ringfx.cost_model.peak_memory.timeline_of import num_bytes
from ringfx.cost_model.prediction.operators import PASSES, PASSES_OF_OTHERS, seconds
from ringfx.cost_model.prediction.profile import Profile
from ringfx.cost_model.step_time.operator_work import OperatorWork, works
from ringfx.ir.step_time import AGAIN, ELEMENTWISE, OPTIMIZER, PRODUCTS, StepPart, StepTime
from ringfx.ir.values import AttentionSite, Captured
from ringfx.ops.tiling.flops import flops_per_pair
from ringfx.passes.capture.gradients import needs_grad

__all__ = ["Timed", "attention_gflops", "optimizer_parts", "timed"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Timed:
    """What every operator of a program takes on one rank."""

    values: Values
    share: Callable[[Node], float]
    power: Callable[[Node], int]
    profile: Profile
    fused: bool
    world_size: int
    work: Mapping[Node, OperatorWork]

    def step(self, sites: Sequence[AttentionSite], further: Iterable[StepPart]) -> StepTime:
        """All of it, with further parts."""
        return StepTime(
            parts=(*self._parts(), *further),
            tokens=max((site.batch * site.kv_len for site in sites), default=0),
            peak_gflops=self._peak(),
            by_block=_by_block((n, self.ms(n)) for n in self.work),
        )

    def again(self, nodes: Collection[Node]) -> StepPart:
        """Running these once more, in backward."""
        again = works(self.values, self.share, fused=self.fused, among=nodes)
        each_s = (seconds(self.profile, x.forward, "forward") for x in again.values())
        ms = 1e3 * self.factor * sum(each_s)
        return StepPart(
            cause=AGAIN, forward_ms=0.0, backward_ms=ms,
            tokens=max(map(self.grows, again), default=0),
            is_split=any(map(self.is_split, again)),
        )  # fmt: skip

    def ms(self, node: Node) -> float:
        return self.forward_ms(node) + self.backward_ms(node)

    def forward_ms(self, node: Node) -> float:
        return 1e3 * self.factor * seconds(self.profile, self.work[node].forward, "forward")

    def backward_ms(self, node: Node) -> float:
        return 1e3 * self.factor * seconds(self.profile, self.work[node].backward, "backward")

    @property
    def factor(self) -> float:
        """Of a whole step, beside operators alone."""
        return self.profile.fused_step_factor if self.fused else self.profile.step_factor

    def is_split(self, node: Node) -> bool:
        return min(map(self.share, (node, *node.all_input_nodes))) < 1

    def grows(self, node: Node) -> int:
        """The power of the length that its work grows with."""
        return max(map(self.power, (node, *node.all_input_nodes)))

    def _parts(self) -> Sequence[StepPart]:
        sums: dict[tuple[str, int, bool], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for node, work in self.work.items():
            flops = work.forward.flops + work.backward.flops
            cause = PRODUCTS if flops else ELEMENTWISE
            total = sums[cause, self.grows(node), self.is_split(node)]
            total[0] += self.forward_ms(node)
            total[1] += self.backward_ms(node)
            total[2] += flops / 1e9
        return [
            StepPart(
                cause=cause, tokens=tokens, is_split=is_split,
                forward_ms=forward, backward_ms=backward, gflops=gflops,
            )
            for (cause, tokens, is_split), (forward, backward, gflops) in sums.items()
        ]  # fmt: skip

    def _peak(self) -> float:
        """Of the type that most work is done in."""
        by_type: dict[str, float] = defaultdict(float)
        for work in self.work.values():
            by_type[work.forward.dtype] += work.forward.flops
        dtype = max(by_type, key=by_type.__getitem__, default="float32")
        row = self.profile.product(dtype, "forward")
        return row.peak_gflops or row.gflops


def timed(
    captured: Captured,
    *,
    carries_tokens: Callable[[Node], bool],
    power: Callable[[Node], int],
    world_size: int,
    profile: Profile,
    compiler: str,
) -> Timed | None:
    """The time of a program's operators; None with a profile of whole strategies.

    Parameters are as in ``step_of``.
    """
    if profile.kind == "observed":
        return None
    graph = captured.graph_module.graph
    inputs = graph.find_nodes(op="placeholder")
    values = values_of(graph, num_bytes, {n: needs_grad(n) for n in inputs})

    def share(node: Node) -> float:
        return 1 / world_size if carries_tokens(node) else 1.0

    fused = compiler == "inductor"
    return Timed(
        values=values, share=share, power=power, profile=profile, fused=fused,
        world_size=world_size, work=works(values, share, fused=fused),
    )  # fmt: skip


def optimizer_parts(
    captured: Captured,
    *,
    optimizer: str | int,
    states: Collection[int],
    state_ranks: StateRanks,
    profile: Profile,
) -> Sequence[StepPart]:
    """The optimizer's step: it reads and writes arrays as large as the parameters."""
    graph = captured.graph_module.graph
    inputs = graph.find_nodes(op="placeholder")
    passes = PASSES.get(optimizer, PASSES_OF_OTHERS)
    moved = 0.0
    for i, node in enumerate(inputs):
        if captured.is_parameter[i] and needs_grad(node):
            moved += passes * num_bytes(node) / (state_ranks.ranks if i in states else 1)
    speed = profile.optimizer_gbytes_per_s or profile.memory_gbytes_per_s
    if not moved or speed is None:
        return ()
    ms = moved / speed / 1e6
    return (StepPart(cause=OPTIMIZER, forward_ms=0.0, backward_ms=ms, tokens=0, is_split=False),)


def attention_gflops(sites: Sequence[AttentionSite], whole: Collection[int], ranks: int) -> float:
    """Operations of one rank, in billions: of pairs that masks leave, a backward twice a forward.

    ``whole``: numbers of the sites that every rank computes all of.
    """
    found = 0.0
    for i, site in enumerate(sites):
        pairs = site.batch * site.heads * site.q_len * site.kv_len * site.density
        flops = pairs * flops_per_pair(site.head_dim, site.v_head_dim, "forward")
        found += flops * (3 if site.trains else 1) / (1 if i in whole else ranks)
    return found / 1e9


def _by_block(times: Iterable[tuple[Node, float]]) -> tuple[tuple[str, float], ...]:
    """Milliseconds by block, in program order."""
    blocks: dict[str, float] = defaultdict(float)
    for node, ms in times:
        blocks[block_of(node)] += ms
    return tuple((name or "elsewhere", ms) for name, ms in blocks.items() if ms)
