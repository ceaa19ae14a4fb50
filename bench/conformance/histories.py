"""Histories of deliveries, and the house policy's verdict after each: a learned no, and a yes again later."""

from __future__ import annotations

from msgspec import Struct

from gateway.learning.evidence import Evidence
from gateway.policy.house import maximum_accuracy, why_not_delivered
from gateway.policy.interface import PolicyView, SlotFacts, Verdict
from gateway.policy.model_family import model_family
from shared.clock import DAY_S
from shared.messages.hardware import Hardware
from shared.messages.jobs import ResultStatus
from shared.messages.offers import BareOffer, TaskType
from shared.planning.feasibility import Feasibility
from shared.planning.hardware import parse_hardware

CHAT, INSTRUCT = TaskType.CHAT, TaskType.INSTRUCT
GEMMA, LLAMA, QWEN, PHI = (
    "google/gemma-3-4b-it",
    "meta-llama/Llama-3.2-3B",
    "Qwen/Qwen2.5-7B",
    "microsoft/phi-4",
)
THEN = 1_800_000_000.0  # when the evidence happened
HALF_LIFE_DAYS, PRIOR_STRENGTH = 30.0, 10.0  # the settings' defaults
LONGEST_DAYS = 1000  # by then every history has faded
COLUMNS = ("history", "offer", "delivered", "spread", "priority", "verdict", "accepted again after")

Runs = tuple[TaskType, str, int, int]  # task type, model, delivered, failed


class History(Struct, frozen=True, kw_only=True):
    """What happened, and the offer that comes so many days later."""

    runs: tuple[Runs, ...]
    task_type: TaskType = CHAT
    model: str = GEMMA
    days: float = 0.0


ALL_FAILED = History(runs=((CHAT, GEMMA, 0, 100),))
HISTORIES = (
    History(runs=()),
    History(runs=((CHAT, GEMMA, 0, 2),)),
    History(runs=((CHAT, GEMMA, 0, 4),)),
    History(runs=((CHAT, GEMMA, 0, 5),)),
    ALL_FAILED,
    History(runs=((CHAT, GEMMA, 0, 100),), days=60),
    History(runs=((CHAT, GEMMA, 0, 100),), days=120),
    History(runs=((CHAT, GEMMA, 0, 100),), days=150),
    History(runs=((CHAT, GEMMA, 0, 100),), model=LLAMA),
    History(runs=((CHAT, GEMMA, 0, 100),), task_type=INSTRUCT),
    History(runs=((CHAT, GEMMA, 0, 100), (CHAT, LLAMA, 0, 5)), model=PHI),
    History(runs=((CHAT, GEMMA, 0, 100), (INSTRUCT, GEMMA, 0, 5)), task_type=TaskType.DPO),
    History(runs=((CHAT, GEMMA, 0, 100), (CHAT, LLAMA, 0, 100), (CHAT, QWEN, 30, 0)), model=QWEN),
    History(runs=((CHAT, GEMMA, 50, 50),)),
    History(runs=((CHAT, GEMMA, 80, 20),)),
    History(runs=((CHAT, GEMMA, 90, 10),)),
)


def lines() -> list[list[str]]:
    """Return the table's cells, the header first."""
    return [list(COLUMNS), ["---"] * len(COLUMNS), *map(_cells, HISTORIES)]


def verdict_after(history: History, days: float | None = None) -> Verdict:
    """Return the house policy's verdict on the history's offer, so many days after its runs."""
    return maximum_accuracy(offer_of(history), view_after(history, days))


def days_until_accepted(history: History) -> int | None:
    """Return the first whole day on which the offer is accepted; None if never."""
    evidence = evidence_of(history)
    for day in range(LONGEST_DAYS):
        if why_not_delivered(offer_of(history), _view(evidence, day)) is None:
            return day
    return None


def offer_of(history: History) -> BareOffer:
    """Return the offer."""
    return BareOffer(task_id="t", task_type=history.task_type, model=history.model, hours_to_complete=4)


def evidence_of(history: History) -> Evidence:
    """Return the evidence of the history's runs."""
    evidence = Evidence(
        prior_strength=PRIOR_STRENGTH, half_life_s=HALF_LIFE_DAYS * DAY_S, family=model_family
    )
    for task_type, model, *counts in history.runs:
        for status, count in zip((ResultStatus.SUBMITTED, ResultStatus.FAILED), counts, strict=True):
            for number in range(count):
                evidence.note_result(f"{task_type}-{model}-{status}-{number}", task_type, model, status, THEN)
    return evidence


def view_after(history: History, days: float | None = None) -> PolicyView:
    """Return what the policy sees, so many days after the runs."""
    return _view(evidence_of(history), history.days if days is None else days)


def _view(evidence: Evidence, days: float) -> PolicyView:
    hardware = parse_hardware("4xH100-80GB")
    return PolicyView(
        slots=(SlotFacts(slot="a", busy=False, live=True, hardware=hardware),),
        tables=evidence.tables(THEN + days * DAY_S),
        expected=hardware,
        max_hours=96.0,
        deadline_margin_s=150.0,
        feasible=_feasible,
    )


def _feasible(offer: BareOffer, hours: float, hardware: Hardware) -> Feasibility:
    return Feasibility(True, "it fits")


def _cells(history: History) -> list[str]:
    view = view_after(history)
    verdict = maximum_accuracy(offer_of(history), view)
    rate = view.tables.delivery_of(history.task_type, model_family(history.model))
    runs = "; ".join(
        f"{delivered} of {delivered + failed} {_kind(kind)} with {model_family(model)}"
        for kind, model, delivered, failed in history.runs
    )
    back = days_until_accepted(history)
    return [
        runs + (f", {history.days:g} days ago" if history.days else "") if runs else "none",
        f"{_kind(history.task_type)} with {model_family(history.model)}",
        f"{rate.value:.3f}",
        f"{rate.spread:.3f}" if rate.spread else "",
        f"{verdict.priority:.3f}",
        "**accepted**" if verdict.accepted else "rejected",
        "never" if back is None else f"{back} day{'s' * (back > 1)}" if back else "",
    ]


def _kind(task_type: TaskType) -> str:
    return task_type.removesuffix("Task").removesuffix("Text")
