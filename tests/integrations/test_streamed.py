"""Streams are parted as accelerate sends them: evenly, the last batch too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset

from ringfx.integrations.streamed import PartsOfBatches, SizeOfLastBatch


class Numbers(IterableDataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


def parts(count: int, group: int, drop_last: bool = False) -> PartsOfBatches:
    given = DataLoader(Numbers(count), batch_size=3, drop_last=drop_last)
    return PartsOfBatches(given, groups=2, group=group)


@pytest.mark.parametrize(
    ("count", "drop_last", "last"),
    [
        (12, False, None),
        (14, False, ([12], [13])),
        (15, False, ([12, 13], [14, 0])),  # filled up with the first
        (16, False, ([12, 13], [14, 15])),
        (17, False, ([12, 13, 14], [15, 16, 0])),
        (17, True, None),
        (1, False, ([0], [0])),
    ],
)
def test_the_last_batch_is_divided_evenly(
    count: int, drop_last: bool, last: tuple[list[int], list[int]] | None
) -> None:
    for group in (0, 1):
        found = [x.tolist() for x in parts(count, group, drop_last)]
        full = [[6 * i + 3 * group + j for j in range(3)] for i in range(count // 6)]
        assert found == [*full, *([last[group]] if last else [])]


def test_a_loader_knows_how_many_examples_its_last_batch_had_and_how_many_batches_there_are() -> (
    None
):
    loader = SizeOfLastBatch.like(
        prepare_data_loader(parts(15, 1).loader(), num_processes=1, process_index=0)
    )
    seen = [(x.tolist(), loader.end_of_dataloader, loader.remainder) for x in loader]
    assert seen == [([3, 4, 5], False, -1), ([9, 10, 11], False, -1), ([14, 0], True, 3)]
    assert len(loader) == len(seen)


def test_who_resumes_skips_parts() -> None:
    loader = prepare_data_loader(parts(15, 1).loader(), num_processes=1, process_index=0)
    assert [x.tolist() for x in skip_first_batches(loader, 1)] == [[9, 10, 11], [14, 0]]
