"""The interface of a policy: one pure function (BareOffer, PolicyView) -> Verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct
from msgspec.structs import force_setattr

from gateway.learning.rates import LearnedRates
from gateway.policy.model_family import model_family
from shared.messages.hardware import Hardware
from shared.messages.offers import BareOffer, DecisionKind, Terms
from shared.planning.feasibility import Feasibility


class SlotFacts(Struct, frozen=True, kw_only=True):
    """The facts of one slot when a decision is made."""

    slot: str
    busy: bool  # runs a job, or is reserved
    live: bool  # its node holds the lease and sent a sign of life recently
    hardware: Hardware | None = None
    faults: tuple[str, ...] = ()  # that its self-test found
    drained: bool = False  # an operator wants it to get no new job
    full: str | None = None  # how full its log is, if it is too full for another job's records

    @property
    def healthy(self) -> bool:
        """Return whether a new job would run here: the slot is live, passed its self-test, and is open."""
        return self.live and not self.faults and self.open

    @property
    def open(self) -> bool:
        """Return whether the slot may get a new job: it isn't drained, and its log has room."""
        return not self.drained and self.full is None


class PolicyView(Struct, frozen=True, kw_only=True):
    """All that a policy may know."""

    slots: tuple[SlotFacts, ...]  # the whole fleet, in the order in which slots are filled
    tables: LearnedRates
    expected: Hardware  # what a slot must show to earn the hardware bonus
    max_hours: float
    deadline_margin_s: float
    # Of an offer, with the hours that are left for it, on some hardware.
    feasible: Callable[[BareOffer, float, Hardware], Feasibility]
    family: Callable[[str], str] = model_family  # of a model's upstream id
    min_points_per_hour: float = 0.0  # what policy `expected_value` asks for

    @property
    def capacity(self) -> int:
        """Jobs that can run at once."""
        return len(self.slots)

    @property
    def busy(self) -> int:
        """Jobs that run or are reserved now."""
        return sum(facts.busy for facts in self.slots)


class Verdict(Struct, frozen=True, kw_only=True):
    """A policy's answer. `slot` is set exactly if accepted; `warning` is for the log.

    `kind` is `accepted` exactly if there is a slot; a rejection that names none is `other`.
    """

    reason: str
    kind: DecisionKind = DecisionKind.OTHER
    slot: str | None = None
    priority: float | None = None
    terms: Terms | None = None
    warning: str | None = None
    policy: str = "maximum_accuracy"

    def __post_init__(self) -> None:
        """Make `kind` agree with `slot`."""
        if self.accepted != (self.kind is DecisionKind.ACCEPTED):
            force_setattr(self, "kind", DecisionKind.ACCEPTED if self.accepted else DecisionKind.OTHER)

    @property
    def accepted(self) -> bool:
        """Return whether the offer is accepted."""
        return self.slot is not None


class Policy(Protocol):
    """Decide on one offer; an accepting verdict names a free slot."""

    def __call__(self, offer: BareOffer, view: PolicyView, /) -> Verdict:
        """Return the verdict. All that may be used is in the view."""
        ...
