"""Planning for hardware that is not there: an 8B model at a million tokens, on a laptop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ringfx.ir.plan import Plan
from ringfx.ir.values import AttentionSite

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
}
SECONDS = 900
"""Where the process is ended: what is held is that planning ends, not how fast this machine is
(``benchmarks/passes.py`` times it)."""
BYTES = 3 * 10**9


def planned(folder: Path, layers: int) -> tuple[Plan, int]:
    """The plan and the most memory that making it held."""
    config = folder / "config.json"
    config.write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": layers}))
    command = [sys.executable, "-m", "ringfx", "plan", str(config), "--seq-len", "1048576"]
    command += ["--world-size", "8", "--json"]
    with (folder / "plan.json").open("w") as output, (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=output, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        ended = threading.Timer(SECONDS, process.kill)
        ended.start()
        _, status, used = os.wait4(process.pid, 0)
        ended.cancel()
    assert status == 0, (folder / "log").read_text()
    plan = Plan.from_json((folder / "plan.json").read_text())
    return plan, used.ru_maxrss * 1024


@pytest.mark.parametrize("layers", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_an_8b_llama_at_a_million_tokens_is_planned_on_a_laptop(
    tmp_path: Path, layers: int
) -> None:
    plan, peak_bytes = planned(tmp_path, layers)
    assert peak_bytes < BYTES
    assert [layer.name for layer in plan.layers] == [
        f"model.layers.{number}.self_attn" for number in range(layers)
    ]
    for layer in plan.layers:
        assert layer.source.rpartition(":")[2].isdigit(), layer.source
        assert is_grouped_causal(layer.site), layer.site


def is_grouped_causal(site: AttentionSite) -> bool:
    sizes = (site.batch, site.heads, site.kv_heads, site.head_dim, site.q_len, site.kv_len)
    return site.spec.is_causal and sizes == (1, 32, 8, 128, 1048576, 1048576)
