"""Processes that are ranks: results in order, each failure with its rank, reports as they come."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ringfx.comm.local_ranks import LocalRanks
from ringfx.errors import CommunicationError
from tests.support.ranks import RankPool


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("seventeen")


def dies_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)


def sleeps_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def leaves_a_trace() -> int:
    dist.new_group([0])  # the next call must not see it
    return len(dist.distributed_c10d._world.pg_map)


def test_a_pool_is_reused_and_returns_results_by_rank(ranks3: RankPool) -> None:
    assert ranks3.run(sum_of_ranks, 1) == [(0, 6), (1, 6), (2, 6)]
    assert ranks3.run(sum_of_ranks, offset=0) == [(0, 3), (1, 3), (2, 3)]


def test_each_call_has_a_process_group_of_its_own(ranks2: RankPool) -> None:
    assert ranks2.run(leaves_a_trace) == ranks2.run(leaves_a_trace) == [2, 1]


@pytest.mark.ranks
def test_failures_name_the_rank_and_the_pool_recovers() -> None:
    with LocalRanks(2, collective_timeout_s=20) as pool:
        with pytest.raises(CommunicationError, match=r"rank 1 of 2: (.|\n)*ValueError: seventeen"):
            pool.run(fails_on_rank_1)
        with pytest.raises(CommunicationError, match="rank 1 of 2: the process died, exit code 3"):
            pool.run(dies_on_rank_1)
        pool.run(sum_of_ranks, 0)  # started again: the limit below is not spent on that
        with pytest.raises(
            CommunicationError, match=r"rank 1 of 2 did not answer (.|\n)*sleeps_on_rank_1"
        ):
            pool.run(sleeps_on_rank_1, timeout_s=5)
        assert pool.run(sum_of_ranks, 0) == [(0, 1), (1, 1)]


def counts(upto: int, report: Callable[[int], None]) -> int:
    print(f"rank {dist.get_rank()} counts")
    for number in range(upto):
        report(number)
    return torch.get_num_threads()


@pytest.mark.ranks
def test_ranks_report_while_they_work_and_print_into_a_file(tmp_path: Path) -> None:
    heard: dict[int, list[int]] = {0: [], 1: []}
    log = tmp_path / "log.txt"
    with LocalRanks(2, threads=2, output=log) as ranks:
        assert ranks.run(counts, 3, on_report=lambda rank, n: heard[rank].append(n)) == [2, 2]
    assert heard == {0: [0, 1, 2], 1: [0, 1, 2]}
    # Lines of two processes may meet in one.
    assert sorted(re.findall(r"rank \d counts", log.read_text())) == [
        "rank 0 counts",
        "rank 1 counts",
    ]
