"""All ranks come together and say what they came for: a rank that is elsewhere is found out.

Messages of a program pair by their order, so two ranks that are in different places of the user's
code would mix them up. Whatever all ranks must do together (a call of the model, a use of a split
output) therefore begins with a meeting, whose small message carries what the rank is about to do.
It goes over connections of the CPU, and waits for no accelerator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from ringfx.comm.process_group import Ranks
from ringfx.errors import AgreementError, CommunicationError
from ringfx.failures.channel import Channel, settled
from ringfx.failures.describe import call_site, cure_after, plain
from ringfx.torch_compat.dispatch import disable_current_modes
from ringfx.torch_compat.fake_tensors import unset_fake_temporarily
from ringfx.units.argument import Argument

__all__ = ["Absent", "all_gather_texts", "meet"]

_NUMBERS, _SIZES, _WORDS = 900_001, 900_002, 900_003
"""Tags that no message of a program has."""

MOST_NUMBERS = 7
"""That a rank may say in a meeting."""


class Absent(CommunicationError):
    """Some ranks did not come, and nothing is known to have kept them."""

    ranks: list[int]


def meet(ranks: Ranks, what: str, numbers: Sequence[int] = ()) -> list[list[int]]:
    """Everyone's numbers, once all ranks have come for the same; as many numbers on all of them.

    Raises
    ------
    AgreementError
        On all ranks: they came for different things.
    CommunicationError
        A rank does not come; the text says why, where that is known.
    """
    label = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little", signed=True)
    padding = [0] * (MOST_NUMBERS - len(numbers))  # gloo ends a process whose sizes do not match
    said = _together(ranks, what, [label, *numbers, *padding])
    if any(row[0] != label for row in said):
        here = f"{what}, from {call_site()}"
        raise settled(
            AgreementError(_different(ranks, all_gather_texts(ranks, what, here.encode())))
        )
    ranks.channel.has_met = True
    return [row[1 : 1 + len(numbers)] for row in said]


def all_gather_texts(ranks: Ranks, what: str, text: bytes) -> list[bytes]:
    """What every rank has to say, of any length."""
    with unset_fake_temporarily(), disable_current_modes():
        mine = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
        lengths = torch.zeros(ranks.size, 1, dtype=torch.int64)
        lengths[ranks.rank] = len(text)
        _swap(ranks, what, lengths[ranks.rank], list(lengths), _SIZES)
        found = [torch.empty(max(1, int(n)), dtype=torch.uint8) for n in lengths]
        found[ranks.rank] = mine
        _swap(ranks, what, mine, found, _WORDS)
        return [bytes(row.tolist())[: int(n)] for row, n in zip(found, lengths, strict=True)]


def _together(ranks: Ranks, what: str, numbers: Sequence[int]) -> list[list[int]]:
    channel = ranks.channel
    with unset_fake_temporarily(), disable_current_modes():
        mine = torch.tensor(numbers, dtype=torch.int64)
        while True:
            found = [torch.empty_like(mine) for _ in range(ranks.size)]
            found[ranks.rank] = mine
            came: list[int] = []
            try:
                with channel.waits(what, is_meeting=True):
                    _send_and_take(channel, mine, found, _NUMBERS, came)
                return [row.tolist() for row in found]
            except RuntimeError as error:
                if channel.moves_up():
                    continue
                raise settled(_absent(channel, what, came, error)) from error


def _swap(ranks: Ranks, what: str, mine: torch.Tensor, found: list[torch.Tensor], tag: int) -> None:
    ranks.guarded(what, "all ranks", lambda: _send_and_take(ranks.channel, mine, found, tag, []))


def _send_and_take(
    channel: Channel, mine: torch.Tensor, found: list[torch.Tensor], tag: int, came: list[int]
) -> None:
    """Everyone's tensor into ``found``; ``came`` lists the ranks whose own has arrived."""
    twin = channel.twin()
    channel.counts.meetings += 1
    others = [(channel.rank + d) % channel.size for d in range(1, channel.size)]
    sending = [twin.send([mine], r, tag) for r in others]
    taking = [twin.recv([found[r]], r, tag) for r in others]
    for r, work in zip(others, taking, strict=True):
        work.wait()
        came.append(r)
    for work in sending:
        work.wait()


def _absent(
    channel: Channel, what: str, came: Sequence[int], error: RuntimeError
) -> CommunicationError:
    waits = channel.ranks_waiting()
    known, why = channel.given_up(error, what)
    if known or "ended" in why or "store" in why:
        cure = cure_after(
            why,
            "read the first error of the rank that failed; where none did, give every rank as many "
            "batches",
        )
        return CommunicationError(
            f"{what}: rank {channel.rank} of {channel.size} was waiting for the others: {why}{cure}"
        )
    here = {*came, channel.rank, *(r for r, place in waits.items() if place == what)}
    missing = [r for r in range(channel.size) if r not in here]
    listed = "".join(f"; rank {r} waits in {waits[r]}" for r in missing if r in waits)
    seconds = f"{channel.timeout.total_seconds():.0f} s"
    found = Absent(
        f"{what}: ranks {missing} did not arrive within {seconds}, the group's timeout{listed} "
        f"({plain(error)}). Do: make the same calls on every rank; raise the group's timeout if "
        "the ranks are only slow."
    )
    found.ranks = missing
    return found


def _different(ranks: Ranks, said: Sequence[bytes]) -> str:
    listed = "\n".join(f"  rank {r}: {text.decode()}" for r, text in enumerate(said))
    return (
        f"the {ranks.size} ranks do different things at the same time:\n"
        f"{listed}\n"
        "All ranks must make the same calls in the same order. Do: call the model, and use its "
        "split outputs, on every rank (compute before `if rank == 0`), or pass "
        f"{Argument('outputs', 'local')} to get each rank's own part."
    )
