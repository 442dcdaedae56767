"""Streamed data, whose length nobody knows: what a group is given, and how large the last batch is.

accelerate reads a stream on one process and sends each its part. Ranks that share a sequence read
it themselves: the same parts, of the last batch too, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from accelerate.data_loader import DataLoaderShard
from accelerate.utils import concatenate, find_batch_size, slice_tensors
from torch.utils.data import DataLoader, IterableDataset

__all__ = ["PartsOfBatches", "SizeOfLastBatch"]


class PartsOfBatches(IterableDataset[Any]):
    """A loader's batches, as many at a time as there are groups; each group takes one.

    What is left at the end is divided evenly, and filled up with the first examples, so that all
    groups make the same number of calls.
    """

    def __init__(self, given: DataLoader[Any], groups: int, group: int) -> None:
        self.given, self.groups, self.group = given, groups, group
        self.examples = 0
        """Of all groups, in the last batch that was read."""

    def __iter__(self) -> Iterator[Any]:
        batches, first = iter(self.given), None
        while parts := [*islice(batches, self.groups)]:
            sizes = [find_batch_size(part) for part in parts]
            if self.given.drop_last and len(parts) < self.groups:
                return
            self.examples = sum(sizes)
            first = parts if first is None else first
            if sizes == [sizes[0]] * self.groups:
                yield parts[self.group]
                continue
            whole = concatenate(parts)
            size, missing = divmod(self.examples, self.groups)
            if missing:
                filling = slice_tensors(concatenate(first), slice(0, self.groups))
                whole, size = concatenate([whole, filling]), size + 1
            yield slice_tensors(whole, slice(self.group * size, (self.group + 1) * size))

    def __len__(self) -> int:
        """In examples."""
        return len(self.given.dataset)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.given.dataset, "set_epoch"):
            self.given.dataset.set_epoch(epoch)

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self, batch_size=None, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


class SizeOfLastBatch(DataLoaderShard):  # type: ignore[misc]
    """Of streamed data, whose length nobody knows: metrics count as many examples and no more."""

    remainder: int

    @classmethod
    def like(cls, loader: DataLoaderShard) -> DataLoaderShard:
        """Of its state; a loader's class is a property, and cannot be set."""
        made = object.__new__(cls)
        made.__dict__.update(loader.__dict__)
        return made

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if self.end_of_dataloader and self.remainder == -1:
                of_groups = isinstance(self.dataset, PartsOfBatches)
                self.remainder = self.dataset.examples if of_groups else find_batch_size(batch)
            yield batch

    def __len__(self) -> int:
        if isinstance(self.dataset, PartsOfBatches):
            return -(-len(self.dataset.given) // self.dataset.groups)
        return super().__len__()  # type: ignore[no-any-return]
