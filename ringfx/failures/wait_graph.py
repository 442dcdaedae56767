"""Where the ranks wait, as they report it; which of them wait for each other in vain.

That nothing has moved for a while proves nothing: a large message over a slow link takes minutes.
What proves it is counted: a rank that has come to a meeting sends nothing more until all have come,
so one that waits for a message which it has not begun to send will never come.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

__all__ = ["Counts", "Stand", "in_vain"]


@dataclass(kw_only=True)
class Counts:
    """What a rank has begun in this epoch; ``sent`` and ``taken`` by the other rank."""

    sent: list[int]
    taken: list[int]
    sums: int = 0
    meetings: int = 0

    @staticmethod
    def none(size: int) -> Counts:
        return Counts(sent=[0] * size, taken=[0] * size)


@dataclass(frozen=True, kw_only=True)
class Stand:
    """What one rank waits in, and what it has begun."""

    epoch: int
    number: int
    what: str
    is_meeting: bool
    counts: Counts
    is_outside: bool = False
    """It is a collective of the user's."""
    holds: list[int] = field(default_factory=list)
    """Ranks that all have to come to it, where it is a barrier of the user's."""

    @staticmethod
    def read(text: bytes | str) -> Stand:
        said = json.loads(text)
        return Stand(**said | {"counts": Counts(**said["counts"])})

    def text(self) -> str:
        return json.dumps(asdict(self))

    def lacks(self, rank: int, other: Stand, mine: int) -> bool:
        """Whether it, rank ``mine``, takes what ``rank``, which stands at ``other``, never sent."""
        counts, others = self.counts, other.counts
        return counts.taken[rank] > others.sent[mine] or counts.sums > others.sums


def in_vain(stands: Mapping[int, Stand], *, patient: bool) -> bool:
    """Whether some of these ranks wait for each other.

    ``patient``: none has moved for a while, so that a barrier which all ranks have come to is over.
    """
    return any(_wait_for_each_other(*pair, patient=patient) for pair in _pairs(stands))


def _pairs(stands: Mapping[int, Stand]) -> Iterator[tuple[int, Stand, int, Stand]]:
    for r, one in stands.items():
        for s, other in stands.items():
            if r != s and one.epoch == other.epoch:
                yield r, one, s, other


def _wait_for_each_other(r: int, one: Stand, s: int, other: Stand, *, patient: bool) -> bool:
    """Whether ``other`` waits for all ranks to come, and ``one`` for something else of it."""
    if other.holds:
        stays = patient and r in other.holds and not one.is_outside
        return stays and (one.is_meeting or one.lacks(s, other, r))
    ahead = other.counts.meetings > one.counts.meetings
    in_message = not one.is_meeting and not one.is_outside
    return other.is_meeting and in_message and ahead and one.lacks(s, other, r)
