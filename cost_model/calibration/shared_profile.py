"""One profile for all ranks: rank 0's.

Strategies follow from the profile, and all ranks must choose alike. Ranks may be on machines of
different kinds, or find different calibrations; then rank 0's constants predict for all, and every
rank's plan says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from ringfx.comm.process_group import Ranks
from ringfx.comm.rendezvous import all_gather_texts, meet
from ringfx.comm.world import World
from ringfx.cost_model.prediction.profile import Profile, load_profile, profile_json, read_profile
from ringfx.errors import ProfileError

__all__ = ["agreed_profile"]


def agreed_profile(name: str | Profile | None, *, device: str, world: World) -> Profile:
    """Rank 0's profile, on every rank; collective where there are several.

    Raises
    ------
    ProfileError
        On every rank, if rank 0 has no profile.
    """
    if world.size == 1:
        return load_profile(name, device=device)
    mine = _found(name, device)
    everyone: list[Profile | str] = [
        text if error else read_profile(text, f"of rank {rank}")
        for rank, (error, text) in enumerate(_exchanged(_as_text(mine), world))
    ]
    first = everyone[0]
    if isinstance(first, str):
        raise ProfileError(f"rank 0: {first}")
    return dataclasses.replace(first, notes=(*first.notes, *_difference(first, everyone)))


def _found(name: str | Profile | None, device: str) -> Profile | ProfileError:
    try:
        return load_profile(name, device=device)
    except ProfileError as error:
        return error


def _as_text(found: Profile | ProfileError) -> tuple[bool, str]:
    if isinstance(found, ProfileError):
        return True, str(found)
    return False, profile_json(found)


def _exchanged(mine: tuple[bool, str], world: World) -> Sequence[tuple[bool, str]]:
    """What every rank says; called while Dynamo's fake tensors are in force."""
    ranks = Ranks.named(world.group, "before the call")
    meet(ranks, "the agreement on a profile before the model's first call")
    said = all_gather_texts(ranks, "the exchange of profiles", json.dumps(mine).encode())
    return [(error, text) for error, text in map(json.loads, said)]


def _difference(first: Profile, everyone: Sequence[Profile | str]) -> tuple[str, ...]:
    """One note for all ranks that would have predicted with something else."""
    others = [
        f"rank {rank} has {found.name if isinstance(found, Profile) else 'none'}"
        for rank, found in enumerate(everyone)
        if not isinstance(found, Profile) or _constants(found) != _constants(first)
    ]
    if not others:
        return ()
    shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
    return (f"all ranks predict with rank 0's profile {first.name}: {shown}",)


def _constants(profile: Profile) -> Profile:
    """Without what a rank says about its own device."""
    return dataclasses.replace(profile, notes=())
