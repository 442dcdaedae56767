"""All ranks predict with one profile, and so choose alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import ringfx
from ringfx.cost_model.prediction.profile import profile_json
from ringfx.ir.note import texts_of
from tests.cost_model.sites import shipped
from tests.support.ranks import RankPool, raises


class Mixer(nn.Module):
    """One attention with as few K/V bytes as a slow link prefers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2).sum()


def _write(folder: Path, name: str, gbytes_per_s: float, gflops: float) -> str:
    """A profile that differs from another in its links and kernels."""
    profile = shipped("cpu-default")
    links = [dataclasses.replace(row, gbytes_per_s=gbytes_per_s) for row in profile.links]
    kernels = [dataclasses.replace(row, gflops=gflops) for row in profile.kernels]
    changed = dataclasses.replace(profile, name=name, links=tuple(links), kernels=tuple(kernels))
    path = folder / f"{name}.json"
    path.write_text(profile_json(changed))
    return str(path)


def _planned(paths: list[str]) -> tuple[str, str, tuple[str, ...], float]:
    torch.manual_seed(0)
    model = ringfx.optimize(Mixer(), compiler="eager", profile=paths[dist.get_rank()])
    x = torch.randn(1, 64, 32)
    loss = model(x)
    plan = model.plan
    return plan.profile, plan.digest(), tuple(texts_of(plan.notes)), float(loss)


@pytest.mark.ranks
def test_ranks_with_different_profiles_follow_rank_0_and_say_so(
    ranks2: RankPool, tmp_path: Path
) -> None:
    fast = _write(tmp_path, "fast-links", gbytes_per_s=1e6, gflops=1)
    slow = _write(tmp_path, "slow-links", gbytes_per_s=1e-6, gflops=1e6)
    found = ranks2.run(_planned, [fast, slow])
    assert [row[0] for row in found] == ["fast-links", "fast-links"]
    assert len({row[1] for row in found}) == 1
    assert found[0][3] == found[1][3]
    words = "all ranks predict with rank 0's profile fast-links: rank 1 has slow-links"
    assert all(words in row[2] for row in found)


@pytest.mark.ranks
def test_ranks_with_equal_profiles_have_nothing_to_say(ranks2: RankPool, tmp_path: Path) -> None:
    path = _write(tmp_path, "same", gbytes_per_s=1, gflops=50)
    found = ranks2.run(_planned, [path, path])
    assert not any("all ranks predict" in note for row in found for note in row[2])


@pytest.mark.ranks
def test_a_rank_without_a_profile_takes_rank_0s(ranks2: RankPool, tmp_path: Path) -> None:
    path = _write(tmp_path, "mine", gbytes_per_s=1, gflops=50)
    found = ranks2.run(_planned, [path, str(tmp_path / "missing.json")])
    assert all("rank 1 has none" in " ".join(row[2]) for row in found)


@pytest.mark.ranks
def test_without_rank_0s_profile_every_rank_raises(ranks2: RankPool, tmp_path: Path) -> None:
    path = _write(tmp_path, "mine", gbytes_per_s=1, gflops=50)
    found = raises(ranks2, _planned, [str(tmp_path / "missing.json"), path])
    assert len(set(found)) == 1
    assert found[0].startswith("ProfileError: rank 0: profile ")
