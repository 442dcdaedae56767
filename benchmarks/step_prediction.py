"""Predicted beside measured time of whole steps: ``python -m benchmarks.step_prediction PROFILE``.

A step is a forward, a backward and one of AdamW. Six models, four lengths, one and two ranks of one
thread each, eager and Inductor, float32. The profile is one that ``ringfx calibrate`` wrote on this
machine; nothing is fitted to these steps. Every case runs in fresh processes; its time is the
median of the slowest rank's steps, and its noise how far half of them lie from it. A few cases are
measured once more at the end: what differs then is the machine's, and stands beside the errors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from rich.console import Console
from rich.table import Table
from torch import nn

import ringfx
from benchmarks.memory import _origin as origin
from ringfx.comm.local_ranks import LocalRanks
from ringfx.ir.plan import Plan
from ringfx.ir.step_time import AGAIN, ELEMENTWISE, OPTIMIZER, PRODUCTS, WAITS

RESULTS = Path(__file__).parent / "results" / "step_prediction.json"
TARGETS = {"median": 0.08, "worst": 0.20}
LENGTHS = (512, 1024, 2048, 4096)
VOCABULARY = 8192
SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}


def _llama() -> nn.Module:
    config = hf.LlamaConfig(
        **SIZES, intermediate_size=704, num_key_value_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=8192,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def _wide_llama() -> nn.Module:
    config = hf.LlamaConfig(
        hidden_size=768, num_hidden_layers=2, num_attention_heads=12, intermediate_size=2048,
        vocab_size=VOCABULARY, max_position_embeddings=8192,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    config = hf.GPT2Config(
        n_embd=256, n_layer=4, n_head=4, n_positions=8192, vocab_size=VOCABULARY, attn_pdrop=0.0,
        resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    config = hf.BertConfig(
        **SIZES, intermediate_size=1024, vocab_size=VOCABULARY, max_position_embeddings=8192,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    return hf.BertForMaskedLM(config)


def _qwen3() -> nn.Module:
    config = hf.Qwen3Config(
        **SIZES, intermediate_size=768, num_key_value_heads=4, head_dim=128, vocab_size=VOCABULARY,
        max_position_embeddings=8192,
    )  # fmt: skip
    return hf.Qwen3ForCausalLM(config)


class _Encoder(nn.Module):
    """torch's own layers, and a loss over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 320)
        layer = nn.TransformerEncoderLayer(
            320, 5, 1280, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(320, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        z = self.head(self.layers(self.embed(input_ids)))
        loss = nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten())
        return hf.modeling_outputs.CausalLMOutput(loss=loss)


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": _llama, "wide llama": _wide_llama, "gpt2": _gpt2, "bert": _bert, "qwen3": _qwen3,
    "torch encoder": _Encoder,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case."""

    model: str
    tokens: int
    ranks: int
    compiler: str
    measured_ms: float
    noise: float
    predicted_ms: float
    parts: Mapping[str, float]

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1

    def words(self) -> str:
        return (
            f"{self.model}, {self.tokens:,} tokens, {self.ranks} ranks, {self.compiler}: measured "
            f"{self.measured_ms:.0f} ms (within {self.noise:.0%}), predicted "
            f"{self.predicted_ms:.0f}: {self.error:+.0%}"
        )


def steps_of(
    model: str, tokens: int, compiler: Any, profile: str, steps: int
) -> tuple[Sequence[float], float, Mapping[str, float]]:
    """Milliseconds of steps after two, what the plan says of one, and the parts of that.

    Of long steps fewer are taken, as many on each rank: the prediction tells how many.
    """
    torch.manual_seed(0)
    made = MODELS[model]()
    split: Any = ringfx.optimize(made, compiler=compiler, profile=profile, optimizer="adamw")
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4)
    given = torch.randint(VOCABULARY, (1, tokens))
    took: list[float] = []
    while len(took) < WARM_UP or len(took) < WARM_UP + _num_steps(split.plan, steps):
        started = time.perf_counter()
        split(input_ids=given, labels=given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        took.append(1e3 * (time.perf_counter() - started))
    plan: Plan = split.plan
    assert plan.step is not None, "a profile of whole strategies says nothing of steps"
    assert plan.step_ms is not None
    causes = (PRODUCTS, ELEMENTWISE, OPTIMIZER, AGAIN, WAITS)
    parts = {cause: plan.step.of(cause) for cause in causes}
    parts |= {"attention": plan.total_ms, "messages": plan.outside_ms}
    return took[WARM_UP:], plan.step_ms, parts


WARM_UP, LEAST_STEPS, ENOUGH_MS = 2, 3, 6000
AGAIN_CASES = 6
"""Spread evenly over all."""


def _num_steps(plan: Plan, most: int) -> int:
    assert plan.step_ms, "a profile of whole strategies says nothing of steps"
    return min(most, max(LEAST_STEPS, round(ENOUGH_MS / plan.step_ms)))


def measured(model: str, tokens: int, ranks: int, compiler: str, profile: str, steps: int) -> Row:
    with LocalRanks(ranks) as started:
        found = started.run(steps_of, model, tokens, compiler, profile, steps)
    slowest = [max(times) for times in zip(*(times for times, _, _ in found), strict=True)]
    middle = statistics.median(slowest)
    return Row(
        model=model, tokens=tokens, ranks=ranks, compiler=compiler, measured_ms=middle,
        noise=statistics.median(abs(x - middle) for x in slowest) / middle,
        predicted_ms=found[0][1], parts=found[0][2],
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compilers", nargs="+", default=["eager", "inductor"])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    console = Console(width=160)
    rows = []
    for compiler in options.compilers:
        for model in options.models:
            for ranks in options.ranks:
                for tokens in options.tokens:
                    row = measured(model, tokens, ranks, compiler, options.profile, options.steps)
                    console.print(row.words(), row.parts)
                    rows.append(row)
    repeated = rows[:: max(1, len(rows) // AGAIN_CASES)]
    again = [
        measured(x.model, x.tokens, x.ranks, x.compiler, options.profile, options.steps)
        for x in repeated
    ]
    differs = [abs(b.measured_ms / a.measured_ms - 1) for a, b in zip(repeated, again, strict=True)]
    errors = [abs(row.error) for row in rows]
    summary = {
        "cases": len(rows), "median": statistics.median(errors), "worst": max(errors),
        "noise": statistics.median(row.noise for row in rows),
        "measured again, median": statistics.median(differs),
        "measured again, worst": max(differs),
    }  # fmt: skip
    result = {
        "what": "predicted beside measured seconds of whole training steps", "targets": TARGETS,
        "summary": summary, "profile": json.loads(Path(options.profile).read_text()),
        "rows": [asdict(row) | {"error": row.error} for row in rows],
        "again": [asdict(row) for row in again], **origin(),
    }  # fmt: skip
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("cases", "median error", "worst", "noise", "again, median", "again, worst")
    table.add_row(*(f"{x}" if isinstance(x, int) else f"{x:.1%}" for x in summary.values()))
    console.print(table)
    return int(summary["median"] > TARGETS["median"] or summary["worst"] > TARGETS["worst"])


if __name__ == "__main__":
    raise SystemExit(main())
