"""What the policy may know now: slots, learned rates, and whether an offer's plan fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

from msgspec.structs import replace

from gateway.learning.rates import LearnedRates
from gateway.policy.house import free_slot
from gateway.policy.interface import PolicyView, SlotFacts
from gateway.state.ledger import Ledger
from gateway.state.presence import Presence
from shared.messages.hardware import Hardware
from shared.messages.offers import BareOffer
from shared.planning.architectures import ModelFacts
from shared.planning.feasibility import Feasibility, check_offer
from shared.planning.transfers import Transfers
from shared.settings import Settings

VIEW_S = 0.05  # the oldest view that an offer may be refused on


class PolicyViews:
    """Makes the views that the policy decides on."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        presence: Presence,
        expected: Hardware,
        tables: Callable[[], LearnedRates],
        family: Callable[[str], str],
        facts: Callable[[str], ModelFacts | None],
        is_here: Callable[[str], bool],
        full_slots: Callable[[], Mapping[str, str]],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._presence = presence
        self._expected = expected
        self._tables = tables
        self._family = family
        self._facts_of = facts
        self._is_here = is_here
        self._full_slots = full_slots
        self._viewed: tuple[int, ...] = ()
        self._viewed_at, self._recent = 0.0, self.now()

    def now(self) -> PolicyView:
        """Return the current view."""
        now = time.time()
        view = PolicyView(
            slots=tuple(self._facts(slot, now) for slot in self._settings.slots),
            tables=self._tables(),
            family=self._family,
            min_points_per_hour=self._settings.min_points_per_hour,
            expected=self._expected,
            max_hours=self._settings.max_hours,
            deadline_margin_s=self._settings.deadline_margin_s,
            feasible=partial(self._feasible, None),
        )
        return replace(view, feasible=partial(self._feasible, free_slot(view)))

    def recent(self) -> PolicyView:
        """Return the last view unless a log has grown since; good enough to refuse on."""
        known, now = tuple(self._ledger.folded.values()), time.monotonic()
        if known != self._viewed or now - self._viewed_at > VIEW_S:
            self._recent, self._viewed, self._viewed_at = self.now(), known, now
        return self._recent

    def _facts(self, slot: str, now: float) -> SlotFacts:
        sign = self._presence.sign(slot)
        return SlotFacts(
            slot=slot,
            busy=self._ledger.holder(slot, now) is not None,
            live=self._presence.live(slot),
            hardware=sign.hardware if sign is not None else None,
            faults=tuple(sign.heartbeat.faults) if sign is not None and sign.heartbeat else (),
            drained=self._ledger.drain_of(slot) is not None,
            full=self._full_slots().get(slot),
        )

    def _feasible(
        self, chosen: SlotFacts | None, offer: BareOffer, hours: float, hardware: Hardware
    ) -> Feasibility:
        return check_offer(
            offer.model,
            offer.model_params_count,
            offer.task_type,
            hours,
            hardware,
            self._settings.profile,
            self._facts_of(offer.model),
            self._transfers(offer.model, chosen),
        )

    def _transfers(self, model: str, chosen: SlotFacts | None) -> Transfers:
        """Return what a job of this model moves, and how fast: as the slot that gets the job measured.

        Without a measurement of its own the slowest rate of the live slots counts, then the setting.
        """
        settings = self._settings
        beats = {
            slot: sign.heartbeat
            for slot in settings.slots
            if self._presence.live(slot) and (sign := self._presence.sign(slot)) and sign.heartbeat
        }
        down = {slot: rate for slot, beat in beats.items() if (rate := beat.download_bytes_per_s)}
        up = {slot: rate for slot, beat in beats.items() if (rate := beat.upload_bytes_per_s)}

        def rate_of(measured: dict[str, float], setting: float) -> float:
            own = measured.get(chosen.slot) if chosen is not None else None
            return own or min(measured.values(), default=setting)

        return Transfers(
            None if self._is_here(model) else rate_of(down, settings.hub_download_bytes_per_s),
            rate_of(up, settings.hub_upload_bytes_per_s) if settings.artifacts_kind == "hub" else None,
        )
