"""Print the house policy's verdicts: on fifteen offers with nothing learned yet, and after histories.

python -m bench offers [--write docs/deciding.md]

The last line is one JSON object: `{"offers", "accepted", "rejected", "threshold", "lowest_accepted",
"highest_rejected", "slowest_us", "histories", "refused_by_history", "failed_100_of_100",
"failed_100_of_100_accepted_after_days"}`.
With `--write` both tables in that page are replaced.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from msgspec import Struct

from bench.conformance.histories import ALL_FAILED, HISTORIES, days_until_accepted, lines, verdict_after
from bench.harness.page import with_part
from gateway.learning.rates import LearnedRates
from gateway.policy.house import THRESHOLD, maximum_accuracy
from gateway.policy.interface import PolicyView, SlotFacts, Verdict
from shared.messages.hardware import Hardware
from shared.messages.offers import BareOffer, TaskType
from shared.planning.feasibility import Feasibility, check_offer
from shared.planning.hardware import parse_hardware

BEGIN, END = "<!-- offers: made by bench/conformance/offers.py -->", "<!-- end of offers -->"
BEGIN_HISTORIES = "<!-- histories: made by bench/conformance/histories.py -->"
END_HISTORIES = "<!-- end of histories -->"
H100, CPU = parse_hardware("4xH100-80GB"), parse_hardware("cpu-8x32GB")
INSTRUCT, DPO, CHAT, GRPO, IMAGE = (
    TaskType.INSTRUCT,
    TaskType.DPO,
    TaskType.CHAT,
    TaskType.GRPO,
    TaskType.IMAGE,
)
REPEATS = 200  # of each decision, to time it


class Example(Struct, frozen=True, kw_only=True):
    """One offer, the expected hardware of a slot, and the hardware that both slots report."""

    what: str
    model: str
    hours: float
    task_type: TaskType = INSTRUCT
    expected: Hardware = H100
    shown: Hardware | None = H100  # None = no live node
    busy: int = 0

    @property
    def slots(self) -> str:
        """Return expected and reported hardware, in short."""
        seen = "nothing live" if self.shown is None else self.shown.name
        full = ", both busy" if self.busy else ""
        return f"{self.expected.name} / {seen}{full}"


EXAMPLES = (
    Example(what="small model", model="HuggingFaceTB/SmolLM2-135M-Instruct", hours=2),
    Example(what="8B, preference pairs", model="meta-llama/Llama-3.1-8B", hours=4, task_type=DPO),
    Example(what="70B, chat", model="meta-llama/Llama-3.3-70B-Instruct", hours=1, task_type=CHAT),
    Example(what="70B, 3 minutes", model="meta-llama/Llama-3.3-70B-Instruct", hours=0.05),
    Example(what="405B", model="meta-llama/Llama-3.1-405B", hours=10),
    Example(what="mixture of experts", model="mistralai/Mixtral-8x7B-v0.1", hours=6),
    Example(what="unknown size", model="cognitivecomputations/dolphin-2.9", hours=5),
    Example(what="GRPO", model="Qwen/Qwen2.5-7B-Instruct", hours=4, task_type=GRPO),
    Example(what="image", model="stabilityai/sdxl-base-1.0", hours=1, task_type=IMAGE),
    Example(what="96.5 hours", model="Qwen/Qwen2.5-7B", hours=96.5),
    Example(what="GPUs absent", model="meta-llama/Llama-3.1-8B", hours=4, shown=CPU),
    Example(what="no live slot", model="meta-llama/Llama-3.2-1B", hours=3, shown=None),
    Example(what="slots full", model="meta-llama/Llama-3.2-1B", hours=3, busy=2),
    Example(
        what="CPU slot, small model",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        hours=2,
        expected=CPU,
        shown=CPU,
    ),
    Example(what="CPU slot, 8B", model="meta-llama/Llama-3.1-8B", hours=4, expected=CPU, shown=CPU),
)
COLUMNS = (
    *("offer", "model, hours", "slot expected / reported"),
    *("task weight", "model performance", "task success", "plan", "hardware", "priority", "verdict"),
)


def verdict_on(example: Example) -> Verdict:
    """Return the house policy's verdict, with rates at house values."""
    return maximum_accuracy(offer_of(example), view_of(example))


def offer_of(example: Example) -> BareOffer:
    """Return the example as an offer; its size is in the model's name."""
    return BareOffer(
        task_id="t", task_type=example.task_type, model=example.model, hours_to_complete=example.hours
    )


def view_of(example: Example) -> PolicyView:
    """Return the fleet of the example."""
    slots = tuple(
        SlotFacts(
            slot=slot,
            busy=number < example.busy,
            live=example.shown is not None,
            hardware=example.shown,
        )
        for number, slot in enumerate("ab")
    )
    return PolicyView(
        slots=slots,
        tables=LearnedRates(),
        expected=example.expected,
        max_hours=96.0,
        deadline_margin_s=150.0,
        feasible=_feasible,
    )


def table() -> list[str]:
    """Return all examples as the lines of one Markdown table."""
    lines = [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
    for example in EXAMPLES:
        verdict = verdict_on(example)
        if verdict.terms is None or verdict.priority is None:
            raise ValueError("the house policy must return every term")
        values = [getattr(verdict.terms, name) for name in verdict.terms.__struct_fields__]
        kind = example.task_type.removesuffix("Task").removesuffix("Text")
        lines.append(
            _row(
                [
                    example.what,
                    f"{example.model} ({kind}), {example.hours:g} h",
                    example.slots,
                    *(f"{term.value * term.weight:.4g}" for term in values),
                    f"{verdict.priority:.3f}",
                    f"{'**accepted**' if verdict.accepted else 'rejected'}: {verdict.reason}",
                ]
            )
        )
    return lines


def page_with(text: str) -> str:
    """Return a page with both tables replaced by new ones."""
    with_offers = with_part(text, BEGIN, END, table())
    return with_part(with_offers, BEGIN_HISTORIES, END_HISTORIES, history_table())


def history_table() -> list[str]:
    """Return all histories as the lines of one Markdown table."""
    return [_row(cells) for cells in lines()]


def summary() -> dict[str, object]:
    """Return the figures of the last line."""
    verdicts = [(example, verdict_on(example)) for example in EXAMPLES]
    accepted = [verdict.priority for _, verdict in verdicts if verdict.accepted]
    # offers without a free slot or with too many hours are rejected before their priority counts
    scored = [verdict.priority for _, verdict in verdicts if verdict.reason.startswith("Priority")]
    return {
        "offers": len(verdicts),
        "accepted": len(accepted),
        "rejected": len(verdicts) - len(accepted),
        "threshold": THRESHOLD,
        "lowest_accepted": min(priority for priority in accepted if priority is not None),
        "highest_rejected": round(max(priority for priority in scored if priority is not None), 4),
        "slowest_us": round(max(_microseconds(example) for example in EXAMPLES), 1),
        "histories": len(HISTORIES),
        "refused_by_history": sum(not verdict_after(history).accepted for history in HISTORIES),
        "failed_100_of_100": "accepted" if verdict_after(ALL_FAILED).accepted else "rejected",
        "failed_100_of_100_accepted_after_days": days_until_accepted(ALL_FAILED),
    }


def main() -> None:
    """Print the table and one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables in this page")
    write: Path | None = parser.parse_args().write
    if write is not None:
        write.write_text(page_with(write.read_text()))
    print("\n".join([*table(), "", *history_table()]))
    print(json.dumps(summary()))


def _microseconds(example: Example) -> float:
    """Return the median time of one decision with the planner's cached result."""
    offer, view, took = offer_of(example), view_of(example), []
    for _ in range(REPEATS):
        began = time.perf_counter()
        maximum_accuracy(offer, view)
        took.append(time.perf_counter() - began)
    return 1e6 * sorted(took)[REPEATS // 2]


def _feasible(offer: BareOffer, hours: float, hardware: Hardware) -> Feasibility:
    return check_offer(offer.model, offer.model_params_count, offer.task_type, hours, hardware)


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
