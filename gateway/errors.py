"""The errors that a request to the gateway can end with."""

from __future__ import annotations

from shared.errors import PodiumError


class NotAcceptedError(PodiumError):
    """A start of a task that was never accepted; nothing was stored."""


class NoSlotError(PodiumError):
    """A start came after its reservation had lapsed, and every slot is taken; nothing was stored."""


class MalformedOfferError(PodiumError):
    """The body is not an offer; nothing was decided."""


class NoSubmissionError(PodiumError):
    """There is no submission to name, and why."""


class UnknownTaskError(PodiumError):
    """No such task was accepted."""


class NotPossibleError(PodiumError):
    """The task is past the point where this can be done; nothing was changed."""


class NodeSilentError(PodiumError):
    """The slot's node did not say that it is done."""


class MalformedScoreError(PodiumError):
    """What was sent is no score; nothing was stored."""


class UnknownScoredTaskError(UnknownTaskError):
    """The score is of a task that this fleet never accepted, and doesn't say what it was."""


class UnauthorizedError(PodiumError):
    """No token, or one that nobody has."""


class ForeignRequestError(PodiumError):
    """Not from this machine by its own will, and nobody but this machine may ask."""


class BusyError(PodiumError):
    """As many do this at once as may."""
