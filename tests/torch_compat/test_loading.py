"""Who uses ring attention by hand loads no compiler, and modules here say what they load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMPILERS = ("torch._dynamo", "torch._inductor", "networkx", "scipy")
ROOM = Path(__file__).parents[2] / "ringfx" / "torch_compat"


def loaded(*modules: str) -> list[str]:
    code = f"import sys, {', '.join(modules)}; print(*(m for m in {COMPILERS} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOM.parents[1],
    )
    return done.stdout.split()


def test_operators_ranks_and_what_says_nothing_load_no_compiler() -> None:
    quiet = [
        f"ringfx.torch_compat.{path.stem}"
        for path in sorted(ROOM.glob("[a-z]*.py"))
        if "loading this module loads" not in path.read_text()
    ]
    assert "ringfx.torch_compat.autograd" in quiet
    assert "ringfx.torch_compat.dynamo" not in quiet
    assert loaded("ringfx.ops", "ringfx.comm.local_ranks", *quiet) == []
