"""What follows a run's last step, and what that takes: by guesses for a plan, by measurements in the run.

A plan keeps as much of the time for it as the run itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from shared.planning.model_shape import ModelShape, ModulePlan

SAFETY = 1.25  # the reserve is this much larger than the measurements say: the closing runs once, unrehearsed
SLACK_S = 1.0  # for what isn't measured: the digest, the outcome's fsync
VERIFY_SHARE = 0.01  # of the budget: what scoring the reloaded export may cost
VERIFY_MOST_S = 60.0  # and in any case: a broken export shows on its first rows
SAVE_BYTES_PER_S = 300e6  # of a synced, hashed save, until one is measured
FIXED_S = 0.5  # of each save and export: files made, synced and renamed


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

    @property
    def reserve_s(self) -> float:
        """Return what a schedule keeps of the time, but for one late step."""
        return self.closing_s + 2 * SLACK_S


class Measured(Struct, frozen=True, kw_only=True):
    """What a run measured before its plan is made."""

    load_s: float
    score_s: float  # of all development rows that are scored
    save_bytes_per_s: float = SAVE_BYTES_PER_S


def expected_costs(
    shape: ModelShape, modules: Sequence[ModulePlan], measured: Measured, budget_s: float
) -> Costs:
    """Return what the closing takes: bytes over the disk's speed where nothing was measured.

    An export is written, and then read once for its digest.
    """
    trained = sum(module.parameters for module in modules)
    rate = measured.save_bytes_per_s
    return Costs(
        load_s=measured.load_s,
        score_s=measured.score_s,
        save_s=FIXED_S + 12 * trained / rate,
        export_s=FIXED_S + 2 * export_bytes(shape, modules) / rate,
        verify_s=verify_limit_s(budget_s),
    )


def verify_limit_s(budget_s: float) -> float:
    """Return what scoring the reloaded export may cost."""
    return min(VERIFY_MOST_S, VERIFY_SHARE * budget_s)


def export_bytes(shape: ModelShape, modules: Sequence[ModulePlan]) -> int:
    """Size of what is submitted: the whole model in 16 bits if any delta is dense, else fp32 factors."""
    if any(module.method == "dense" for module in modules):
        return 2 * shape.parameters
    return 4 * sum(module.parameters for module in modules)
