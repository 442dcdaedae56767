"""Which ranks get which data: groups, the sampler over them, batches that ranks load in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import ringfx
from ringfx.data import SequenceGroups, SequenceGroupSampler, whole_batch
from ringfx.errors import InvalidArgument
from tests.support.harness import RankPool

EXAMPLES: Any = list(range(10))


def indices(shape: tuple[int, ...] | None, **options: Any) -> list[int]:
    names = ("data", "sequence")[-len(shape or ()) :]
    mesh = None if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=names)
    return [*SequenceGroupSampler(EXAMPLES, mesh=mesh, shuffle=False, **options)]


def test_alone_all_examples_are_mine() -> None:
    assert indices(None) == EXAMPLES


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("shape", "options", "groups"),
    [
        (None, {}, [0, 0, 0, 0]),
        ((4,), {}, [0, 0, 0, 0]),
        ((2, 2), {}, [0, 0, 1, 1]),
        (None, {"sequence_ranks": 2}, [0, 0, 1, 1]),
        ((4, 1), {}, [0, 1, 2, 3]),
        ((1, 4), {}, [0, 0, 0, 0]),
    ],
)
def test_each_group_has_its_own_examples(
    ranks4: RankPool, shape: Any, options: Any, groups: list[int]
) -> None:
    count = max(groups) + 1
    padded = EXAMPLES + EXAMPLES[: -len(EXAMPLES) % count]
    assert ranks4.run(indices, shape, **options) == [padded[group::count] for group in groups]


def shuffled() -> list[int]:
    sampler = SequenceGroupSampler(EXAMPLES, seed=3)
    sampler.set_epoch(1)
    return [*sampler]


@pytest.mark.ranks
def test_ranks_of_a_group_shuffle_alike(ranks2: RankPool) -> None:
    first, second = ranks2.run(shuffled)
    assert first == second != EXAMPLES


def words(**options: Any) -> str:
    if options.get("mesh") == "a mesh":
        options["mesh"] = init_device_mesh("cpu", (2,))
    with pytest.raises(InvalidArgument) as refused:
        SequenceGroups.of(**options)
    return str(refused.value)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"sequence_ranks": 3},
            "sequence_ranks=3 does not divide the 2 ranks. Do: pass one of [1, 2]",
        ),
        ({"sequence_ranks": "all"}, "sequence_ranks='all' does not divide"),
        ({"sequence_ranks": 2, "mesh": "a mesh"}, "mesh and sequence_ranks say the same"),
        ({"mesh": 7}, "mesh must be a DeviceMesh of all 2 ranks"),
    ],
)
def test_groups_that_cannot_be_are_refused(ranks2: RankPool, options: Any, said: str) -> None:
    assert all(said in text for text in ranks2.run(words, **options))


# --- batches in parts -------------------------------------------------------------------------


def in_parts(lengths: list[int]) -> Any:
    start = sum(lengths[: dist.get_rank()])
    whole = torch.arange(2 * sum(lengths)).view(2, -1)
    mine = whole[:, start : start + lengths[dist.get_rank()]]
    given = {"ids": mine, "more": [mine.double()[..., None], torch.ones(3)], "name": "x"}
    return whole_batch(given), whole


@pytest.mark.ranks
@pytest.mark.parametrize("lengths", [[4, 4, 4], [5, 1, 3]])
def test_parts_are_joined_in_the_order_of_ranks(ranks3: RankPool, lengths: list[int]) -> None:
    for found, whole in ranks3.run(in_parts, lengths):
        assert torch.equal(found["ids"], whole)
        assert torch.equal(found["more"][0], whole.double()[..., None])
        assert torch.equal(found["more"][1], torch.ones(3))
        assert found["name"] == "x"


def refused_part(what: str) -> str:
    rows = 2 + (what == "rows" and dist.get_rank())
    given = torch.zeros(rows, 3, requires_grad=what == "gradient")
    with pytest.raises(InvalidArgument) as refused:
        whole_batch({"ids": given})
    return str(refused.value)


@pytest.mark.ranks
def test_parts_of_other_examples_are_refused(ranks2: RankPool) -> None:
    assert all(
        "they may differ along dimension 1 alone" in x for x in ranks2.run(refused_part, "rows")
    )
    assert all("requires a gradient" in x for x in ranks2.run(refused_part, "gradient"))


def test_alone_a_batch_is_whole() -> None:
    batch = {"ids": torch.zeros(2, 3)}
    assert ringfx.data.whole_batch(batch) is batch
