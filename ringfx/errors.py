"""Every error that a user can meet. Its text says what happened, where, and what to do."""

from __future__ import annotations

__all__ = [
    "AgreementError",
    "AttentionMissed",
    "AttentionNotFound",
    "AttentionReplicated",
    "BufferChanged",
    "CaptureRefused",
    "CommunicationError",
    "DeferredLost",
    "InvalidArgument",
    "NoAxisRule",
    "OutOfMemory",
    "ProfileError",
    "RingfxError",
    "SplitWrite",
    "StrategyRefused",
    "VerificationError",
]


class RingfxError(RuntimeError):
    """The base of all errors raised on purpose by ringfx."""


class InvalidArgument(RingfxError, ValueError):
    """An argument of a public function cannot be used; the text names it and its choices."""


class CaptureRefused(RingfxError):
    """The program holds a construct that capture cannot carry without changing its meaning."""


class AttentionNotFound(RingfxError):
    """The program has no attention over a sequence, so there is nothing to split."""


class AttentionMissed(RingfxError):
    """Strict mode: a region looks like attention and was neither found nor declined."""


class AttentionReplicated(RingfxError):
    """Strict mode: an attention was found and cannot be split; the text says why."""


class NoAxisRule(RingfxError):
    """An operator reads sharded tokens and the axis table has no row for it."""


class StrategyRefused(RingfxError):
    """A requested strategy cannot run at a layer."""


class AgreementError(RingfxError):
    """The ranks do not run the same program on the same inputs."""


class BufferChanged(RingfxError):
    """A mask buffer has other values than when the model was compiled."""


class SplitWrite(RingfxError):
    """A write into a split value or into a view of it, which the other would not see."""


class DeferredLost(RingfxError):
    """An output that is computed when it is first used can no longer be: its operands changed."""


class CommunicationError(RingfxError):
    """A rank did not answer in time, or a message had the wrong size."""


class OutOfMemory(RingfxError):
    """No tile size fits the device memory; the text says how much would."""


class ProfileError(RingfxError):
    """A measurement profile cannot be read, or lacks rows for the request."""


class VerificationError(RingfxError):
    """The rewritten program breaks an invariant: a defect of ringfx, never of the user's model."""
