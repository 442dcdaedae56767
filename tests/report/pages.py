"""Plans for pages: one of attention alone, and one with all that a page shows."""

from __future__ import annotations

import dataclasses

from ringfx.cost_model import choose
from ringfx.ir.memory_plan import MemoryPart, MemoryPlan
from ringfx.ir.note import Note
from ringfx.ir.plan import Plan
from ringfx.ir.step_time import StepPart, StepTime
from ringfx.ir.values import Collective, CommKind, Declined, InChunks, TokenAxis
from tests.cost_model.sites import causal_site, full_site, shipped

H100 = shipped("h100-sxm-published")


def attention_plan(*, world_size: int = 12) -> Plan:
    """Six layers, of which every second one is causal."""
    sites = [causal_site(i, 2**16) if i % 2 else full_site(i, 2**16) for i in range(6)]
    return Plan(
        world_size=world_size,
        gpu_memory=None,
        device="cuda",
        profile=H100.name,
        profile_origin=H100.origin,
        layers=choose(sites, world_size=world_size, profile=H100),
    )


def full_plan() -> Plan:
    """As many parts of every kind as a large model has."""
    causes = (
        "optimizer state", "gradients of activations", "parameters", "held by Inductor for reuse",
        "attention's workspace", "recomputed for checkpoints", "parameter gradients", "temporaries",
        "gradient buckets", "saved by attention",
    )  # fmt: skip
    steps = ("matrix products", "other operators", "optimizer")
    near = Declined(
        node="p", name="pooler." * 12, source=f"/opt/{'deep/' * 20}model.py:3",
        reason="its weights have other users",
    )  # fmt: skip
    return dataclasses.replace(
        attention_plan(world_size=8),
        gpu_memory=80 * 2**30,
        optimizer="adamw",
        axes=(TokenAxis(axis="tokens", length=2**16, layout="zigzag", local_length=2**13),),
        collectives=(
            *(_move(f"model.layers.{i}.mlp.weight", 86 * 2**20) for i in range(32)),
            _move("lm_head.weight", 250 * 2**20),
            *(_gather(i) for i in range(8)),
        ),
        chunks=(
            InChunks(
                name="lm_head", source="model.py:9", tokens=4096, count=4, bytes=2**28,
                gradients="with it", deferred=1,
            ),
        ),
        declined=(near,),
        memory=MemoryPlan(
            parts=tuple(
                MemoryPart(cause=cause, bytes=(22 - 2 * i) * 2**29, kind="split", detail="layer 3")
                for i, cause in enumerate(causes)
            ),
            by_block=tuple((f"model.layers.{i}", 2**30) for i in range(32)),
            over_program=tuple(2**30 * (2 + (7 * i) % 60) for i in range(48)),
        ),
        step=StepTime(
            parts=tuple(
                StepPart(cause=n, forward_ms=20.0 / 4**i, backward_ms=40.0 / 4**i, gflops=2e4,
                         tokens=1, is_split=True)
                for i, n in enumerate(steps)
            ),
            tokens=2**16,
            attention_gflops=9e4,
            peak_gflops=9.89e5,
        ),
        notes=(Note(text="the profile is published, not measured"),),
    )  # fmt: skip


def _move(name: str, size: int) -> Collective:
    return Collective(
        node=name, name=name, source="", kind=CommKind.ALL_REDUCE, bytes_moved=size,
        reason="completes its gradient", in_backward=True,
    )  # fmt: skip


def _gather(layer: int) -> Collective:
    name = f"model.layers.{layer}.moe"
    return Collective(
        node=name, name=name, source="moe.py:4", kind=CommKind.ALL_GATHER, bytes_moved=2**22,
        reason="sorts all tokens",
    )  # fmt: skip
