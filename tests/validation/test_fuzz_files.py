"""Any damage to a file gives a clear error or a harmless value."""

from __future__ import annotations

import pytest

from tests.validation.fuzz_files import KINDS, fuzz


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_clearly_or_harmless(kind: str) -> None:
    verdicts = fuzz(kind, 50)
    assert not [verdict for verdict in verdicts if verdict.startswith("WRONG")]
