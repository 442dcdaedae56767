"""Planning a large model on a small machine: ``python -m benchmarks.planning``.

An 80-layer Llama at 1,048,576 tokens for 1,024 ranks, through the command as a user runs it, with a
budget so that there is something to choose. Measured are wall and CPU seconds and the largest
resident memory of the process. On a machine that others share, wall time is an upper bound.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.memory import _origin as origin

RESULTS = Path(__file__).parent / "results" / "planning.json"
MOST_SECONDS, MOST_BYTES = 60.0, 3e9

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1 << 20,
    "torch_dtype": "bfloat16",
    "use_cache": False,
}


def main() -> int:
    """Prints and writes what it took; 1 if that was too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, default=1024)
    parser.add_argument("--seq-len", default="1M")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(CONFIG))
        words = [str(config), "--seq-len", options.seq_len, "--world-size", options.world_size]
        words += ["--dtype", "bfloat16", "--profile", "h100-sxm-published"]
        words += ["--gpu-memory", "640GiB", "--optimizer", "adamw", "--json"]
        start, load = time.perf_counter(), os.getloadavg()[0]
        done = subprocess.run(
            [sys.executable, "-m", "ringfx", "plan", *map(str, words)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        wall_s = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    plan = json.loads(done.stdout)
    result = {
        "what": "planning an 80-layer model",
        "ranks": options.world_size,
        "tokens": options.seq_len,
        "layers": len(plan["layers"]),
        "wall_seconds": round(wall_s, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_resident_bytes": used.ru_maxrss * 1024,
        "load_before": load,
        "limits": {"seconds": MOST_SECONDS, "bytes": MOST_BYTES},
        **origin(),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print({name: result[name] for name in list(result)[:8]})
    too_much = result["cpu_seconds"] > MOST_SECONDS or used.ru_maxrss * 1024 > MOST_BYTES
    return int(too_much)


if __name__ == "__main__":
    sys.exit(main())
