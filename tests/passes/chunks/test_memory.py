"""What a plan counts of values that exist one chunk at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cost_model.peak_memory.test_peak import Small
from tests.support.programs import lowered

TOKENS = 4096


def parts_of(compiler: str, words: int, **options: Any) -> dict[str, int]:
    given = torch.zeros(1, TOKENS, dtype=torch.int64)
    made = lowered(Small(64, 3, words), given, given, compiler=compiler, **options)
    assert made.plan.memory is not None
    return {part.cause: part.bytes for part in made.plan.memory.parts}


@pytest.mark.parametrize(("compiler", "copies"), [("aot_eager", 2), ("inductor", 1)])
def test_inductor_writes_the_gradient_of_a_chunks_logits_over_them(
    compiler: str, copies: int
) -> None:
    rows, words = TOKENS // 4, 4000  # so wide that the peak is in the loss
    parts = parts_of(compiler, words, chunks=rows)
    assert parts["one chunk at a time"] == copies * rows * words * 4


def test_inductor_keeps_nothing_of_a_chunk_for_the_next_layers() -> None:
    parts = parts_of("inductor", 256, chunks=TOKENS // 4, recompute="layers")
    hidden_states = TOKENS // 2 * 64 * 4
    assert parts.get("held by Inductor for reuse", 0) <= hidden_states
