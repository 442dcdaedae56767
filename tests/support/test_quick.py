"""What `make quick` leaves out is found by reading the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.quick import ROOT, why_not_quick


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import torch\nfrom ringfx.ir.plan import Plan", None),
        ("from tests.support.ranks import RankPool\ndef test_x(ranks2: RankPool): ...", None),
        ("from tests.support.ranks import RankPool\nRankPool(2)", "RankPool()"),
        ("import ringfx\nringfx.plan(1)", "ringfx.plan"),
        ("from ringfx import optimize", "ringfx.optimize"),
        ("def test_x():\n    from transformers import LlamaConfig", "transformers.LlamaConfig"),
        ("import torch\ntorch.compile(f)", "torch.compile"),
        ("from ringfx.ir import planned", None),
        ("from tests.support.harness import Case", "harness.py: "),
    ],
)
def test_a_file_is_quick_if_nothing_in_reach_compiles(
    tmp_path: Path, text: str, reason: str | None
) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(text)
    found = why_not_quick(path)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_the_rules_and_masks_are_among_the_quick_ones() -> None:
    quick = ("passes/axes/test_rules.py", "passes/exprs/test_elements.py", "ir/test_tiles.py")
    assert {name: why_not_quick(ROOT / "tests" / name) for name in quick} == dict.fromkeys(quick)
