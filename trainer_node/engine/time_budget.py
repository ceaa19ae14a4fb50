"""What the end of a run costs, and how much of its time that leaves for training."""

from __future__ import annotations

from enum import StrEnum

from shared.planning.throughput import SAFETY, SLACK_S, Costs


class Part(StrEnum):
    """What the closing can do without, in the order in which it is skipped."""

    AVERAGE = "average"  # score the averaged weights too
    SCORE = "score"  # score the last weights
    VERIFY = "verify"  # reload the export and score it


def affordable(left_s: float, costs: Costs) -> frozenset[Part]:
    """Return what to keep of the closing when `left_s` seconds are left.

    Scoring the last weights watches the clock, so half of its time is enough to begin: half of the rows tell
    more than none.
    """
    need = SAFETY * costs.export_s + SLACK_S
    kept: list[Part] = []
    for part, seconds in (
        (Part.VERIFY, SAFETY * costs.load_s + costs.verify_s),
        (Part.SCORE, costs.score_s / 2),
        (Part.AVERAGE, 1.5 * costs.score_s),
    ):
        need += seconds
        if left_s < need:
            break
        kept.append(part)
    return frozenset(kept)
