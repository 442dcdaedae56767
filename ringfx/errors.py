"""Every error that a user can meet. Its text says what happened, where, and what to do.

"Cause" and "Cure" of each class are the catalogue of errors in the documentation: docs/site reads
them from here, and the texts that each class is raised with from the source.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "DEFECT",
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
    "Shortfall",
    "SplitDiffers",
    "SplitWrite",
    "StrategyRefused",
    "VerificationError",
]


DEFECT = (
    "This is a defect of ringfx. Do: run the model without it, and please report this text with "
    "the model."
)
"""Ends every text about a check of ringfx on itself."""


class RingfxError(RuntimeError):
    """The base of all errors raised on purpose by ringfx.

    Cause: as the class that is raised says. A few texts have no class of their own: second
    derivatives, a model that has not run yet, kernels that an environment variable forces.

    Cure: do what the text says after ``Do:``. ``except ringfx.RingfxError`` catches every error
    that ringfx raises on purpose.
    """


class InvalidArgument(RingfxError, ValueError):
    """An argument of a public function cannot be used; the text names it and its choices.

    Cause: an argument, an option of a command, or a file that was named has a value that cannot be
    used, or two of them contradict each other.

    Cure: change the argument that the text names to one of the values that it lists.
    """


class CaptureRefused(RingfxError):
    """The program holds a construct that capture cannot carry without changing its meaning.

    Cause: the model's code holds something whose meaning would change when it is traced to one
    graph, such as control flow that depends on data, a write in place that would change a gradient,
    or a hand-written kernel.

    Cure: change the line that the text names, as it says; or keep that part out of the compiled
    model with ``torch.compiler.disable``.
    """


class AttentionNotFound(RingfxError):
    """The program has no attention over a sequence, and no other axis that could be one.

    Cause: no attention was recognised in the programs of this model: it has none and no sequence
    by itself, a graph break keeps it outside the compiler, or what looks like attention was
    declined, with the reason.

    Cure: run ``ringfx explain MODEL``, which lists every region that looks like attention and why
    it was not taken. Call ``scaled_dot_product_attention`` there, or run the model without ringfx.
    """


class AttentionMissed(RingfxError):
    """Strict mode: a region looks like attention and was neither found nor declined.

    Cause: ``strict=True`` was passed, and a count that is independent of detection finds an
    attention that was neither found nor declined.

    Cure: call ``scaled_dot_product_attention`` at the place that the text names; or leave
    ``strict`` out: the region then runs whole on every rank, and a warning says so.
    """


class AttentionReplicated(RingfxError):
    """Strict mode: an attention was found and cannot be split; the text says why.

    Cause: ``strict=True`` was passed, and an attention that was found cannot be split.

    Cure: change what the reason names; or leave ``strict`` out: the attention then runs whole on
    every rank, in the time and memory of one rank, and a warning says so.
    """


class NoAxisRule(RingfxError):
    """An operator reads sharded tokens and the axis table has no row for it.

    Cause: the model calls an operator that ringfx does not know, often one of a package or of your
    own, on tokens that are split. Nothing is replicated unasked.

    Cure: give a rule for it (``rules=ringfx.RULES | {operator: rule}``, one line for an operator
    that works token by token), or pass ``on_unsupported='gather'``.
    """


class StrategyRefused(RingfxError):
    """A requested strategy cannot run at a layer.

    Cause: ``strategy=`` names a strategy that this attention does not admit, with the numbers
    compared; or no strategy admits it on so many ranks.

    Cure: leave the choice to ringfx (``strategy='auto'``), take an admissible strategy that the
    text lists, or change the number of ranks.
    """


class AgreementError(RingfxError):
    """The ranks do not run the same program on the same inputs.

    Cause: ranks were given different inputs, weights, options or random seeds, or make different
    calls, such as ``if rank == 0:`` around a call of the model or a use of its outputs.

    Cure: give all ranks that share a sequence the same batch and weights, seed them alike, and make
    the same calls on each. Where a data loader divides batches by ranks, use ``ringfx.data`` or
    ``ringfx.integrations``.
    """


class BufferChanged(RingfxError):
    """A mask buffer has other values than when the model was compiled.

    Cause: a mask in a module's buffer was compiled as the function of positions that it was; then
    it was written.

    Cure: call ``torch._dynamo.reset()`` after changing it; if it changes often, pass it to
    ``forward`` as an argument.
    """


class SplitDiffers(RingfxError):
    """``ringfx.verify`` found that a split model gives something else than the unsplit one.

    Cause: outputs, loss or gradients of the split model differ from the unsplit model's by more
    than rounding: a defect of ringfx, or a wrong rule or strategy of your own.

    Cure: read which layer the report names first, leave rules and strategies of your own out to see
    whose fault it is, and report what is ringfx's with the model.
    """


class SplitWrite(RingfxError):
    """A write into a split value or into a view of it, which the other would not see.

    Cause: code that is not compiled, after a graph break or outside the model, writes into a split
    value of which a view was taken before, or changes its shape in place.

    Cure: write before you take the view, take the part with ``.clone()``, or make a new tensor.
    """


class DeferredLost(RingfxError):
    """An output that is computed when it is first used can no longer be: its operands changed.

    Cause: logits that a model returns beside its loss are computed when they are first used, and
    something that they are computed from was written or freed before, such as weights by
    ``optimizer.step()``.

    Cure: use the output before the optimizer's step, or pass ``chunks='none'``, which computes it
    with the model.
    """


class CommunicationError(RingfxError):
    """A rank did not answer in time, or a message had the wrong size.

    Cause: another rank failed, was killed, hangs or runs another program; the text says what was
    waited for and, where it is known, why the other rank ended.

    Cure: read the first error of the rank that the text names. If ranks are only slow, pass a
    longer ``timeout`` to ``init_process_group``.
    """


@dataclass(frozen=True, kw_only=True)
class Shortfall:
    """By how much a budget is missed, and what would help."""

    needed: int
    """Bytes that one rank needs at least."""
    budget: int
    causes: tuple[tuple[str, int], ...]
    """What they are made of, the most first."""
    remedies: tuple[str, ...]
    """Changes after which it fits, the cheapest first; empty: of a sweep, which looks for none."""


class OutOfMemory(RingfxError):
    """No choice fits the memory of a rank, or no tile that of a device; the text says what would.

    ``shortfall``: the figures of a plan's budget, where that is what is exceeded.

    Cause: no plan fits the budget (``gpu_memory``), or the device had no room for the smallest tile
    of an attention.

    Cure: take one of the changes that the text lists with their figures, such as more ranks,
    sharded states, layers computed again, or a shorter sequence.
    """

    def __init__(self, text: str, shortfall: Shortfall | None = None) -> None:
        super().__init__(text)
        self.shortfall = shortfall


class ProfileError(RingfxError):
    """A measurement profile cannot be read, or lacks rows for the request.

    Cause: the profile, which says what kernels and messages cost on a machine, is missing, damaged
    or of another version, or has no figures for this device, kernel or number of ranks.

    Cure: run ``ringfx calibrate`` on the machine in question, or name one of the profiles that the
    text lists.
    """


class VerificationError(RingfxError):
    """The rewritten program breaks an invariant: a defect of ringfx, never of the user's model.

    Cause: a check of ringfx on its own result failed; the model is not at fault.

    Cure: run the model without ringfx, and please report the defect with the model and the whole
    text.
    """
