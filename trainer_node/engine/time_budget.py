"""What the end of a run costs, and how much of its time that leaves for training."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

SAFETY = 1.25  # the reserve is this much larger than the measurements say: the closing runs once, unrehearsed


SLACK_S = 1.0  # for what isn't measured: the digest, the outcome's fsync


class Part(StrEnum):
    """What the closing can do without, in the order in which it is skipped."""

    AVERAGE = "average"  # score the averaged weights too
    SCORE = "score"  # score the last weights
    VERIFY = "verify"  # reload the export and score it


class Costs(Struct, kw_only=True):
    """Seconds that the parts of a run take on its clock: estimates first, replaced by measurements."""

    import_s: float = 0.0  # start a process: what its imports take
    load_s: float = 0.0  # load the model once
    ingest_s: float = 0.0  # read and tokenise the data
    score_s: float = 0.0  # score the development rows once
    save_s: float = 0.0  # one checkpoint, until it is on disk
    export_s: float = 0.0  # write the submission
    verify_s: float = 0.0  # score the reloaded submission on a few rows

    @property
    def closing_s(self) -> float:
        """Return the seconds of all that must follow the last step: save, score, export, reload, verify.

        What can't be cut short counts SAFETY times; scoring and verifying watch the clock. The last save goes
        on during scoring and is at most half of one with an optimiser. No time is kept for other candidates
        than the last weights: after a decay to zero the average seldom wins, and what the safety margin
        leaves over may suffice to try it.
        """
        first = max(self.score_s, SAFETY * self.save_s / 2)
        return first + SAFETY * (self.export_s + self.load_s) + self.verify_s


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
