"""The errors that a request to the gateway can end with."""

from __future__ import annotations

from shared.errors import PodiumError


class NotAcceptedError(PodiumError):
    """A start of a task that was never accepted; nothing was stored."""


class MismatchedStartError(PodiumError):
    """A start is not for the task that was accepted, or not from its validator; nothing was stored."""


class NoSlotError(PodiumError):
    """A start came after its reservation had lapsed, and every slot is taken; nothing was stored."""


class MalformedOfferError(PodiumError):
    """The body is not an offer; nothing was decided."""


class NoSubmissionError(PodiumError):
    """The task has no submission; the text is why."""


class UnknownTaskError(PodiumError):
    """No such task was accepted."""


class UnknownSlotError(PodiumError):
    """The fleet has no such slot."""


class NotPossibleError(PodiumError):
    """The task is past the point where this can be done; nothing was changed."""


class NodeSilentError(PodiumError):
    """The slot's node did not confirm."""


class MalformedScoreError(PodiumError):
    """The body is not a score; nothing was stored."""


class UnknownScoredTaskError(UnknownTaskError):
    """The scored task was never accepted by this fleet, and its type and model are not given."""


class UnauthorizedError(PodiumError):
    """The token is missing or unknown."""


class ForeignRequestError(PodiumError):
    """Without API tokens only direct local requests are allowed; this one is foreign."""


class BusyError(PodiumError):
    """Too many concurrent requests."""
