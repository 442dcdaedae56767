"""What a plan has to say beside its numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from ringfx.validation.fields import Text

__all__ = ["Note", "NoteKind", "noted", "texts_of"]


class NoteKind(StrEnum):
    """What a note is about, for those who act on it; people read its text."""

    NOTE = "note"
    """Nothing acts on it."""
    GRAPH_BREAK = "graph_break"
    """A program ended early, or is called by code that runs uncompiled."""
    DENSE_MASK = "dense_mask"
    """A mask or bias is read with an entry for each query and key."""
    NO_ATTENTION = "no_attention"
    """What is taken for tokens in a model without attention."""
    WHOLE = "whole"
    """What every rank computes whole, and for which operator."""
    NO_VALUES = "no_values"
    """Masks read buffers whose values are not known here."""
    BUDGET = "budget"
    """Of the budget of memory: another budget, other notes."""
    PROFILE = "profile"
    """Of the profile that the times are predicted with: another profile, other notes."""


@dataclass(frozen=True, kw_only=True)
class Note:
    text: Text
    kind: NoteKind = NoteKind.NOTE

    def __str__(self) -> str:
        return self.text


def noted(texts: Iterable[str], kind: NoteKind = NoteKind.NOTE) -> tuple[Note, ...]:
    """A note for each text."""
    return tuple(Note(text=text, kind=kind) for text in texts)


def texts_of(notes: Iterable[Note], *kinds: NoteKind) -> list[str]:
    """What the notes of these kinds say; without kinds, what all say."""
    return [note.text for note in notes if not kinds or note.kind in kinds]
