"""The table of strategies: what each admits, and why not."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from ringfx.ir.strategies import STRATEGIES
from ringfx.ir.values import AttentionSite
from ringfx.ops.attention import IMPLEMENTATIONS
from tests.ops.cases import spec


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


def test_every_strategy_has_an_implementation() -> None:
    assert set(STRATEGIES) == set(IMPLEMENTATIONS)
    assert all(name == strategy.name for name, strategy in STRATEGIES.items())


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_plain_attention_is_admitted(name: str) -> None:
    assert STRATEGIES[name].admits(_site(heads=8), 4) is None


@pytest.mark.parametrize("name", STRATEGIES)
def test_dropout_is_refused_with_its_reason(name: str) -> None:
    refusal = STRATEGIES[name].admits(_site(heads=8, dropout=0.1), 4)
    assert refusal is not None
    assert refusal.reason.startswith("attention dropout of 0.1 in training: its random mask")
    assert refusal.remedy == "set the model's attention dropout to 0, or call model.eval()"


def test_ulysses_says_which_ranks_divide_the_heads() -> None:
    refusal = STRATEGIES["ulysses"].admits(_site(heads=12), 8)
    assert refusal is not None
    assert refusal.reason == '"ulysses" needs heads % ranks == 0; here 12 heads, 8 ranks'
    assert refusal.remedy == (
        'use a number of ranks that divides them (2, 3, 4, 6, 12), or "production"'
    )


def test_the_table_loads_neither_cost_model_nor_operators() -> None:
    code = (
        "import sys, types; sys.modules['ringfx'] = m = types.ModuleType('ringfx');"
        "import importlib.util as u;"
        "p = u.find_spec('tests').submodule_search_locations[0] + '/../ringfx';"
        "m.__path__ = [p]; import ringfx.ir.strategies;"
        "print(sorted(n for n in sys.modules if n.startswith(('ringfx.', 'torch'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['ringfx.ir', 'ringfx.ir.strategies']"
