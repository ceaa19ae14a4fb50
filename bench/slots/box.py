"""A box whose GPUs are divided among slots: which jobs it accepts, how far each is trained, when it is done.

Pure: offers in, runs out. A slot trains at its share of the box's speed. A job is accepted if a slot is free
when it is offered, as the gateway does; it ends after its useful epochs, or at its deadline.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct


class Offer(Struct, frozen=True):
    """One job that is offered to the box."""

    name: str
    at_s: float
    seconds: float  # until it must be submitted
    epoch_tokens: int


class SlotRun(Struct, frozen=True):
    """One accepted job."""

    offer: Offer
    slot: int
    epochs: float
    ends_s: float

    @property
    def took_s(self) -> float:
        """Seconds from the offer to the submission."""
        return self.ends_s - self.offer.at_s


def play(
    offers: Sequence[Offer], slots: int, tokens_per_s: float, most_epochs: float
) -> tuple[list[SlotRun], list[Offer]]:
    """Return the runs and the refused offers of a box of that speed, divided among so many slots."""
    free_at = [0.0] * slots
    runs, refused = list[SlotRun](), list[Offer]()
    speed = tokens_per_s / slots
    for offer in sorted(offers, key=lambda one: one.at_s):
        slot = min(range(slots), key=lambda number: free_at[number])
        if free_at[slot] > offer.at_s:
            refused.append(offer)
            continue
        epochs = min(most_epochs, offer.seconds * speed / offer.epoch_tokens)
        ends_s = offer.at_s + epochs * offer.epoch_tokens / speed
        free_at[slot] = ends_s
        runs.append(SlotRun(offer, slot, epochs, ends_s))
    return runs, refused
