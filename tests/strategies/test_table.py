"""The table of strategies: what each admits, and why not."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest

from ringfx.ir.values import AttentionSite
from ringfx.strategies import DEFAULT, STRATEGIES
from tests.ops.cases import spec
from tests.test_rooms import ROOT, sources


def _site(heads: int, dropout: float = 0.0) -> AttentionSite:
    return AttentionSite(
        node="attention",
        name="layers.0",
        source="model.py:1",
        found_by="sdpa",
        spec=replace(spec(), dropout=dropout),
        mask_words="full",
        density=1.0,
        balanced=True,
        batch=1,
        heads=heads,
        kv_heads=heads,
        head_dim=8,
        v_head_dim=8,
        dtype="float32",
        device="cpu",
        trains=True,
    )


def test_every_strategy_stands_under_its_name_and_is_glossed() -> None:
    assert all(name == strategy.name for name, strategy in STRATEGIES.items())
    assert all(strategy.gloss and strategy.summary for strategy in STRATEGIES.values())
    assert DEFAULT in STRATEGIES


def test_no_strategy_is_special_cased_outside_its_own_file() -> None:
    """A name in quotes is looked for, in code and not in texts."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}"
        for path in sources()
        if path.relative_to(ROOT).parts[0] != "strategies"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in STRATEGIES
    ]
    assert not found


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_plain_attention_is_admitted(name: str, dropout: float) -> None:
    assert STRATEGIES[name].admits(_site(heads=8, dropout=dropout), 4) is None


def test_ulysses_says_which_ranks_divide_the_heads() -> None:
    refusal = STRATEGIES["ulysses"].admits(_site(heads=12), 8)
    assert refusal is not None
    assert refusal.reason == '"ulysses" needs heads % ranks == 0; here 12 heads, 8 ranks'
    assert refusal.remedy == (
        'use a number of ranks that divides them (2, 3, 4, 6, 12), or "production"'
    )
