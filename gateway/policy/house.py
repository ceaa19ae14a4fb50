"""The house policy. Pure: all that a policy may use is in its view."""

from __future__ import annotations

from msgspec.structs import replace

from gateway.policy.interface import PolicyView, SlotFacts, Verdict
from shared.messages.offers import BareOffer, DecisionKind, Term, Terms

RATE_WEIGHT = 0.15  # of each of the three learned rates
MAXIMUM_ACCURACY_BONUS = 0.40
H100_MAXIMUM_BONUS = 0.35
THRESHOLD = 0.85  # the priority must be above it

# Upstream multiplies a period's points, 3 per win and -1 per failure, by their mean: (3w - f)^2 / (w + f).
# At house rates (w = .25 and f = .10 of the jobs) one more failure then costs .93 wins. So a job gains if
# .25/.90 of its chance to be delivered exceeds .93 of its chance to fail: above .77.
BREAK_EVEN = 0.77


def maximum_accuracy(offer: BareOffer, view: PolicyView) -> Verdict:
    """Reject if no slot is free, then if the job is too long, then if its priority is too low.

    A task type that is not delivered with the model's family earns none of the two bonuses. The verdict
    always has every term of the score.
    """
    chosen = free_slot(view)
    earned = terms_of(offer, view, chosen)
    terms = _without_bonuses(earned, doubt) if (doubt := why_not_delivered(offer, view)) else earned
    priority = priority_of(terms)
    if view.busy >= view.capacity:
        return Verdict(
            reason=f"At maximum accuracy capacity ({view.capacity} jobs for #1)",
            kind=DecisionKind.CAPACITY,
            warning=f"At maximum accuracy capacity: {view.busy}/{view.capacity} jobs",
            priority=priority,
            terms=terms,
        )
    if offer.hours_to_complete > view.max_hours:
        reason = f"Job duration too long (>{view.max_hours:g} hours)"
        return Verdict(reason=reason, kind=DecisionKind.TOO_LONG, priority=priority, terms=terms)
    if priority > THRESHOLD and chosen is not None:
        reason = f"Accepted for ranking #1 optimization - priority {priority:.3f}"
        return Verdict(
            reason=reason, kind=DecisionKind.ACCEPTED, slot=chosen.slot, priority=priority, terms=terms
        )
    missed = [
        term.cause for term in (terms.maximum_accuracy_bonus, terms.h100_maximum_bonus) if not term.value
    ]
    reason = "; ".join([f"Priority {priority:.3f} below #1 threshold", *dict.fromkeys(missed)])
    return Verdict(reason=reason, kind=_rejection_kind(earned, view), priority=priority, terms=terms)


def why_not_delivered(offer: BareOffer, view: PolicyView) -> str | None:
    """Return the evidence that tasks like this one are not delivered here, or None.

    One standard deviation of doubt is in the offer's favour: one or two failures refuse nothing yet.
    """
    if not view.tables.delivery.learned:
        return None
    rate = view.tables.delivery_of(offer.task_type, view.family(offer.model))
    if rate.value + rate.spread >= BREAK_EVEN:
        return None
    return f"{rate.cause}: {rate.value:.3f} +- {rate.spread:.3f} is below the break-even of {BREAK_EVEN:g}"


def _without_bonuses(terms: Terms, why: str) -> Terms:
    """Return the terms with no bonus earned; one that was missed anyway keeps its own cause."""
    plan, hardware = terms.maximum_accuracy_bonus, terms.h100_maximum_bonus
    return replace(
        terms,
        maximum_accuracy_bonus=replace(plan, value=0.0, cause=why if plan.value else plan.cause),
        h100_maximum_bonus=replace(hardware, value=0.0, cause=why if hardware.value else hardware.cause),
    )


def _rejection_kind(terms: Terms, view: PolicyView) -> DecisionKind:
    """Return the bonus that was missed; the plan first, because no other slot would make it fit.

    If neither was, the evidence is against the offer.
    """
    if not terms.maximum_accuracy_bonus.value:
        return DecisionKind.PLAN
    return DecisionKind.PRIORITY if terms.h100_maximum_bonus.value else why_no_slot(view)


def priority_of(terms: Terms) -> float:
    """Return min(1, sum of value * weight)."""
    summands = (
        terms.task_weight,
        terms.model_performance,
        terms.task_success,
        terms.maximum_accuracy_bonus,
        terms.h100_maximum_bonus,
    )
    return min(1.0, sum(term.value * term.weight for term in summands))


def free_slot(view: PolicyView) -> SlotFacts | None:
    """Return the first slot that is free, live and healthy, and shows the expected hardware."""
    for facts in view.slots:
        if not facts.busy and facts.healthy and _name(facts) == view.expected.name:
            return facts
    return None


def why_no_slot(view: PolicyView) -> DecisionKind:
    """Return why no slot gets a job: the full log of one that would, or else the hardware."""
    with_room = replace(view, slots=tuple(replace(facts, full=None) for facts in view.slots))
    return DecisionKind.HARDWARE if free_slot(with_room) is None else DecisionKind.LOG_FULL


def terms_of(offer: BareOffer, view: PolicyView, chosen: SlotFacts | None) -> Terms:
    """Return the five terms of an offer; `chosen` is the slot that it would get, if one is free."""
    family = view.family(offer.model)
    weight = view.tables.task_weight.rate(offer.task_type)
    performance = view.tables.model_performance.rate(family)
    success = view.tables.task_success.rate(offer.task_type)
    return Terms(
        task_weight=Term(weight.value, RATE_WEIGHT, weight.cause),
        model_performance=Term(performance.value, RATE_WEIGHT, performance.cause),
        task_success=Term(success.value, RATE_WEIGHT, success.cause),
        maximum_accuracy_bonus=_plan_bonus(offer, view, chosen),
        h100_maximum_bonus=_hardware_bonus(view, chosen),
    )


def _plan_bonus(offer: BareOffer, view: PolicyView, chosen: SlotFacts | None) -> Term:
    """Earned if a plan fits memory and deadline; without a chosen slot, on the expected hardware."""
    hours_left = offer.hours_to_complete - view.deadline_margin_s / 3600
    if hours_left <= 0:
        cause = (
            f"{offer.hours_to_complete:g} hours leave no time: "
            f"{view.deadline_margin_s:g} s are kept as a margin before the deadline"
        )
        return Term(0.0, MAXIMUM_ACCURACY_BONUS, cause)
    hardware = chosen.hardware if chosen is not None and chosen.hardware is not None else view.expected
    feasibility = view.feasible(offer, hours_left, hardware)
    return Term(float(feasibility.ok), MAXIMUM_ACCURACY_BONUS, feasibility.cause)


def _hardware_bonus(view: PolicyView, chosen: SlotFacts | None) -> Term:
    wanted = view.expected.name
    if chosen is not None:
        return Term(1.0, H100_MAXIMUM_BONUS, f"slot {chosen.slot} is free, live and shows {wanted}")
    seen = ", ".join(f"{facts.slot}: {_condition(facts)}" for facts in view.slots)
    return Term(0.0, H100_MAXIMUM_BONUS, f"no free and live slot shows {wanted} ({seen})")


def _condition(facts: SlotFacts) -> str:
    if facts.busy:
        return "busy"
    if facts.drained:
        return "drained by an operator"
    if facts.full is not None:
        return f"{facts.full}, a job's records might not be stored"
    if facts.live and facts.faults:
        return f"failed its self-test, {facts.faults[0]}"
    return _name(facts) if facts.live else "not live"


def _name(facts: SlotFacts) -> str:
    return facts.hardware.name if facts.hardware is not None else "unknown hardware"
