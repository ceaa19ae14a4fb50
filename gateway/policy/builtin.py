"""The built-in policies by name."""

from __future__ import annotations

from math import sqrt
from types import MappingProxyType

from gateway.learning.rates import LearnedRates
from gateway.policy.house import free_slot, maximum_accuracy, terms_of, why_no_slot
from gateway.policy.interface import Policy, PolicyView, SlotFacts, Verdict
from shared.messages.offers import BareOffer, DecisionKind, Terms
from shared.planning.feasibility import ASSUMED_PARAMETERS, LONGEST_HOURS
from shared.planning.model_name import parameters_from_name

POINTS_OF_FIRST, POINTS_OF_FAILURE = 3.0, 1.0  # upstream's scores; all others get 0
SHORTEST_HOURS = 1 / 60  # keeps points per hour finite for any offer


def first_come(offer: BareOffer, view: PolicyView) -> Verdict:
    """Accept all that fits a free slot with the expected hardware; the learned rates don't matter."""
    chosen = free_slot(view)
    terms = terms_of(offer, view, chosen)
    kind, why = _obstacle(offer, view, terms, chosen)
    if chosen is None or kind is not DecisionKind.ACCEPTED:
        return Verdict(reason=why, kind=kind, terms=terms, policy="first_come")
    reason = f"Accepted: {terms.maximum_accuracy_bonus.cause}"
    return Verdict(reason=reason, kind=kind, slot=chosen.slot, terms=terms, policy="first_come")


def expected_value(offer: BareOffer, view: PolicyView) -> Verdict:
    """Accept what fits and promises above `min_points_per_hour`: W * (3p - q) / hours of upstream's points.

    p = chance of the first place, q = of submitting nothing valid, W = upstream's weight of the task. The
    priority of its decisions is points per hour.
    """
    chosen = free_slot(view)
    terms = terms_of(offer, view, chosen)
    p, q = win_chance(offer, view.tables, view.family(offer.model)), 1.0 - terms.task_success.value
    work = task_work(offer)
    points = work * (POINTS_OF_FIRST * p - POINTS_OF_FAILURE * q)
    rate = points / max(offer.hours_to_complete, SHORTEST_HOURS)
    figures = f"{points:.2f} points expected = {work:.1f} x (3 x {p:.3f} - {q:.3f}), {rate:.2f} per hour"
    kind, reason = _obstacle(offer, view, terms, chosen)
    slot = None
    if kind is DecisionKind.ACCEPTED and chosen is not None:
        if rate > view.min_points_per_hour:
            slot, reason = chosen.slot, f"Accepted: {figures}"
        else:
            kind = DecisionKind.PRIORITY
            reason = f"Too little to win: {figures}, not above {view.min_points_per_hour:g}"
    return Verdict(reason=reason, kind=kind, slot=slot, priority=rate, terms=terms, policy="expected_value")


def win_chance(offer: BareOffer, tables: LearnedRates, family: str) -> float:
    """Return the chance of the first place: the task type's, in proportion to the model family's success.

    It never exceeds the chance to deliver anything.
    """
    wins = tables.task_weight.rate(offer.task_type).value
    lift = tables.model_performance.rate(family).value / tables.model_performance.house
    return min(wins * lift, tables.task_success.rate(offer.task_type).value)


def task_work(offer: BareOffer) -> float:
    """Return upstream's weight of a task: max(1, 2 sqrt(hours * billions of parameters, from 1 to 40))."""
    parameters = offer.model_params_count or parameters_from_name(offer.model) or ASSUMED_PARAMETERS
    billions = min(40, max(1, parameters // 10**9))
    return max(1.0, 2.0 * sqrt(min(offer.hours_to_complete, LONGEST_HOURS) * billions))


def _obstacle(
    offer: BareOffer, view: PolicyView, terms: Terms, chosen: SlotFacts | None
) -> tuple[DecisionKind, str]:
    """Return what rules an offer out, whatever it is worth; ACCEPTED and no reason if nothing does."""
    if chosen is None and view.busy >= view.capacity:
        return DecisionKind.CAPACITY, f"All {view.capacity} slots are busy"
    if offer.hours_to_complete > view.max_hours:
        return DecisionKind.TOO_LONG, f"Job duration too long (>{view.max_hours:g} hours)"
    if chosen is None:
        return why_no_slot(view), f"No slot: {terms.h100_maximum_bonus.cause}"
    if not terms.maximum_accuracy_bonus.value:
        return DecisionKind.PLAN, f"No plan: {terms.maximum_accuracy_bonus.cause}"
    return DecisionKind.ACCEPTED, ""


BUILT_IN: MappingProxyType[str, Policy] = MappingProxyType(
    {"maximum_accuracy": maximum_accuracy, "expected_value": expected_value, "first_come": first_come}
)
