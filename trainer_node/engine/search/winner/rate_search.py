"""A search for the learning rate before one long run, as the winner of June 2026 does it: pure.

Probes are short runs at a constant rate on the same rows, each from the base model's weights. They are judged
by the median of their last training losses, and the highest rate within 2.5% of the best one is taken. Where
a stage's number of steps or spacing is not known, it is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from msgspec import Struct
from msgspec.structs import replace

from shared.planning.plan import Plan
from shared.planning.throughput import FILL
from trainer_node.engine.search.strategy.budget import Budget
from trainer_node.engine.search.trial import Trial, TrialResult, last_pass_of

SHARE = 0.20  # of the time, for all probes together
FILLED = 0.95  # of SHARE is planned: a probe is a whole number of steps
TOLERANCE = 0.025  # a higher rate may be so much worse than the best one
LAST_SHARE = 0.2  # of a probe's steps: their median loss judges it
RAMP_STEPS = 5  # until a probe has its rate
CHECK = (-0.30, 0.0, 0.30)  # decades around the plan's rate, if little time is left
COARSE = (-0.30, 0.0, 0.30, 0.60)  # four rates; their spacing is that of CHECK, which is known
FINE = (0.0, -0.075, 0.075, 0.15)  # around the best coarse one
GAPS = 2  # rates of the last stage; how many is not known
GAP_REACH, LEAST_GAP = 0.45, 0.1  # decades from the best rate, and between two rates
CHECK_STEPS, COARSE_STEPS, FINE_STEPS = (15, 100), (25, 100), (50, 150)
FINE_EPOCHS, GAP_EPOCHS = 1.0, 2.0  # that must be affordable for the fine stage, and for the last one
USABLE, STRETCH = 0.85, 1.25  # of the time left; epochs are planned for so much more, and the clock ends them
LEAST_EPOCHS, MOST_EPOCHS, MOST_EPOCHS_FEW, FEW_ROWS = 1.3, 3.0, 4.0, 10_000
SNAPSHOTS, SOUP_SHARE = 8, 0.04  # averages to score, in so much of the time: its soup has a few minutes
LATE = 1.15  # what comes after the run may take so much longer than it should
DIVERGED = 0.1  # of the lowest rate, if no probe gives a number


class Judge(Struct, frozen=True):
    """How probes are compared."""

    tolerance: float = TOLERANCE
    highest: float = math.inf  # factor on the plan's rate
    last_pass: bool = False  # a pass over the development rows ends the run


OF_TEXT = Judge(last_pass=True)
# A rate too high for pairs lowers their training loss by letting both log-probabilities collapse, so they are
# compared on development rows, and no rate is above the plan's. A pass over these rows is known of text only.
OF_PAIRS = Judge(tolerance=0.0, highest=1.0)


def trial_of(arm: str, plan: Plan, mean_length: float) -> Trial:
    """Return the trial of the plan's own rate and batch; `mean_length` in tokens."""
    batch = plan.packs_per_step * plan.capacity * FILL / mean_length
    return Trial(arm=arm, batch=max(1, round(batch)))


def next_trial(
    start: Trial, done: Sequence[TrialResult], budget: Budget, judge: Judge = OF_TEXT
) -> Trial | None:
    """Return the next probe, or the run that takes all other time, or its pass over the development rows."""
    if done and done[-1].trial.main:
        return _last_pass(done[-1], budget, judge)
    if done and done[-1].trial.last_pass:
        return None
    stage, steps = (done[-1].trial.stage, 0.0) if done else _first_stage(start, budget)
    epochs = done[-1].trial.epochs if done else steps * start.batch / budget.examples
    while stage:
        planned = [rate for rate in _rates(stage, done, judge) if 10**rate <= judge.highest * 1.001]
        missing = planned[sum(result.trial.stage == stage for result in done) :]
        if missing:
            probe = replace(start, stage=stage, rate=10 ** missing[0], epochs=epochs)
            spent = budget.all_s - budget.left_s
            if spent + budget.cost_s(probe) > SHARE * budget.all_s:
                break
            return probe
        stage = _after(stage, budget)
        if stage == "fine":
            epochs *= FINE_STEPS[0] / COARSE_STEPS[0]
    return _main(start, chosen(done, judge), budget, judge)


def chosen(done: Sequence[TrialResult], judge: Judge = OF_TEXT) -> float:
    """Return the highest rate that is hardly worse than the best one, among the longest probes."""
    if not done:
        return 1.0
    longest = max(result.trial.epochs for result in done)
    judged = [result for result in done if result.probe_loss is not None]
    if not judged:
        return DIVERGED * min(result.trial.rate for result in done)
    judged = [result for result in judged if result.trial.epochs > 0.99 * longest] or judged
    best = min(result.probe_loss or 0.0 for result in judged)
    most = best + judge.tolerance * abs(best)
    return max(result.trial.rate for result in judged if (result.probe_loss or 0.0) <= most)


def _first_stage(start: Trial, budget: Budget) -> tuple[str, float]:
    """Return the stage to begin with and the steps of its probes; "" if there is no time for any."""
    step_s = budget.epoch_tokens * start.batch / budget.examples / budget.tokens_per_s
    affordable = budget.all_s * budget.tokens_per_s / budget.epoch_tokens  # epochs
    share_s = FILLED * SHARE * budget.all_s

    def steps(probes: int, weight: float) -> float:
        """Return the steps of each probe, if all together are `weight` times as long as one."""
        return (share_s - probes * budget.trial_s) / step_s / weight

    if affordable >= FINE_EPOCHS:
        gaps = GAPS if affordable >= GAP_EPOCHS else 0
        longer = FINE_STEPS[0] / COARSE_STEPS[0]
        probes = len(COARSE) + len(FINE) + gaps
        found = steps(probes, len(COARSE) + longer * (len(FINE) + gaps))
        if found >= COARSE_STEPS[0]:
            return "coarse", min(found, COARSE_STEPS[1], FINE_STEPS[1] / longer)
    found = steps(len(CHECK), len(CHECK))
    return ("check", min(found, CHECK_STEPS[1])) if found >= CHECK_STEPS[0] else ("", 0.0)


def _rates(stage: str, done: Sequence[TrialResult], judge: Judge) -> list[float]:
    """Return the rates of a stage in decades from the plan's; those before it are done."""
    if stage in ("check", "coarse"):
        return list(CHECK if stage == "check" else COARSE)
    before = [result for result in done if result.trial.stage in ("coarse", "fine")[: 1 + (stage == "gaps")]]
    centre = math.log10(chosen(before, judge))
    if stage == "fine":
        return [centre + offset for offset in FINE]
    tried = sorted(math.log10(result.trial.rate) for result in before)
    gaps = [(high - low, (low + high) / 2) for low, high in pairwise(tried)]
    near = [gap for gap in gaps if gap[0] >= LEAST_GAP and abs(gap[1] - centre) <= GAP_REACH]
    return [middle for _, middle in sorted(near, reverse=True)[:GAPS]]


def _after(stage: str, budget: Budget) -> str:
    """Return the stage after one that is complete."""
    if stage == "coarse":
        return "fine"
    affordable = budget.all_s * budget.tokens_per_s / budget.epoch_tokens
    return "gaps" if stage == "fine" and affordable >= GAP_EPOCHS else ""


def _main(start: Trial, rate: float, budget: Budget, judge: Judge) -> Trial:
    """Return the run that counts; it leaves time to score averages and to pass over the development rows."""
    leaves_s = min(SNAPSHOTS * budget.score_s, SOUP_SHARE * budget.all_s)
    if judge.last_pass:
        leaves_s += LATE * budget.cost_s(last_pass_of(start))
    left_s = budget.left_s - budget.trial_s - leaves_s
    affordable = USABLE * left_s * budget.tokens_per_s / budget.epoch_tokens
    most = MOST_EPOCHS_FEW if budget.examples < FEW_ROWS else MOST_EPOCHS
    epochs = min(most, max(LEAST_EPOCHS, STRETCH * affordable))
    return replace(start, rate=rate, epochs=epochs, main=True, leaves_s=leaves_s)


def _last_pass(run: TrialResult, budget: Budget, judge: Judge) -> Trial | None:
    """Return one pass over the development rows from the run's weights, if there is time for it."""
    last = last_pass_of(run.trial)
    if not judge.last_pass or run.loss is None or budget.cost_s(last) > budget.left_s:
        return None
    return last
