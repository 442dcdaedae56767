"""Messages under way between two operators of a program, by the storage that they arrive in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ringfx.errors import DEFECT, CommunicationError
from ringfx.torch_compat.autograd import storage_id

__all__ = ["Pending"]


class Pending:
    """What waits for each message."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._waits: dict[int, Callable[[], None]] = {}

    def begin(self, arriving: torch.Tensor, wait: Callable[[], None]) -> None:
        self._waits[storage_id(arriving)] = wait

    def finish(self, arriving: torch.Tensor) -> None:
        """Wait.

        Raises
        ------
        CommunicationError
            Nothing arrives in this tensor.
        """
        wait = self._waits.pop(storage_id(arriving), None)
        if wait is None:
            raise CommunicationError(
                f"{self._what} that is not in progress was waited for: the compiler copied the "
                f"tensor between the start and the end of the message. {DEFECT}"
            )
        wait()
