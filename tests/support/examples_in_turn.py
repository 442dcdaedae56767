"""Several examples in one process: ``python -m tests.support.examples_in_turn NAME ...``.

Importing torch and transformers takes longer than they do. They share one process group: in torch
2.13
gloo cannot join the same ranks a second time.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
import torch.distributed as dist


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name in ("init_process_group", "destroy_process_group"):
        setattr(dist, name, _nothing)
    for name in sys.argv[1:]:
        example = importlib.import_module(f"examples.{name}")
        sys.argv = [name, "--compiler", "eager"]
        if os.environ.get("RANK", "0") == "0":
            print(f"example {name}", flush=True)
        example.main()
        sys.stdout.flush()
        torch.compiler.reset()


def _nothing(*args: Any) -> None:
    """In the place of what joins ranks, and of what parts them."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
