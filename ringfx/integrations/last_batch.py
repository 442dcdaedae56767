"""Streamed data, whose last batch may be smaller: accelerate does not know its size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.data_loader import DataLoaderShard
from accelerate.utils import find_batch_size

__all__ = ["SizeOfLastBatch"]


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
                self.remainder = find_batch_size(batch)
            yield batch
