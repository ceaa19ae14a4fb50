"""Results and upstream's scores -> learned rates: Beta posteriors whose evidence fades. Pure.

The house value counts as `prior_strength` trials. A trial weighs 1 when it happens and half as much after
every half-life, so each rate goes back to its house value: no task type is locked out forever.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

import msgspec
from msgspec import Struct

from gateway.learning.delivery import Counts, Pair, delivery_table
from gateway.learning.rates import MEANINGS, LearnedRates, Rate, Table
from shared.clock import DAY_S
from shared.messages.jobs import ResultStatus, Score
from shared.messages.offers import TaskType
from shared.messages.runs import ErrorCode

FIRST_PLACE = 3.0  # upstream's quality scores
PENALTY = -1.0
NOT_IN_FIRST_FOUR = 1000.0  # upstream's synth_loss of everybody else
FADED = 0.01  # trials; with fewer the house value is shown


class Observation(Struct, frozen=True):
    """One trial of one rate."""

    table: str  # a field of LearnedRates
    key: str
    success: bool
    at: float


class Case(Struct, frozen=True, kw_only=True):
    """The evidence of one task."""

    task_type: TaskType
    model: str
    status: ResultStatus | None = None  # how it ended, once it did
    code: ErrorCode | None = None  # why it failed
    ended_at: float = 0.0
    score: Score | None = None  # upstream's, once received


def first_place(score: Score) -> bool:
    """Return whether upstream ranked the submission first."""
    return score.quality_score >= FIRST_PLACE


def among_first_four(score: Score) -> bool:
    """Return whether it was among the four that upstream also measured on synthetic data; no penalty was."""
    loss = score.synth_loss
    measured = loss is not None and isfinite(loss) and loss != NOT_IN_FIRST_FOUR
    return score.quality_score > 0 or (measured and score.quality_score > PENALTY)


def delivered(case: Case) -> bool:
    """Return whether something valid was submitted: our own result, unless upstream's score disagrees."""
    score = case.score
    if score is not None and score.quality_score <= PENALTY:
        return False
    if score is not None and score.quality_score > 0:  # a lost answer may hide a stored submission
        return True
    return case.status in (None, ResultStatus.SUBMITTED)


def observations(case: Case, family: str) -> list[Observation]:
    """Return the trials of the three rates that one task is.

    Its evidence dates from the task's end, whenever upstream scored it: a rate measures how well runs of that
    time did. A cancelled task is no evidence. Without a score a task is no evidence of ranks, even if it
    failed: counting failures only would sink every family of a fleet that never imports scores. Nor is it
    evidence of delivery if it failed for its data, which nobody could have used: upstream scores a task
    only if others delivered it, and then the failure was ours.
    """
    if case.status is ResultStatus.CANCELLED:
        return []
    score, found = case.score, []
    at = case.ended_at if case.status is not None else score.scored_at if score is not None else 0.0
    if score is not None:
        found += [
            Observation("task_weight", case.task_type, first_place(score), at),
            Observation("model_performance", family, among_first_four(score), at),
        ]
    if score is not None or (case.status is not None and case.code is not ErrorCode.BAD_DATA):
        found.append(Observation("task_success", case.task_type, delivered(case), at))
    return found


class Tally:
    """Fading counts of one rate, as of the newest trial."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._at: float | None = None
        self._trials = self._successes = 0.0

    def add(self, observation: Observation, sign: int = 1) -> None:
        """Count one trial; with sign -1 undo one that was counted before."""
        if self._at is None or observation.at > self._at:
            if self._at is not None:
                faded = self._weight(self._at, observation.at)
                self._trials, self._successes = self._trials * faded, self._successes * faded
            self._at = observation.at
        weight = sign * self._weight(observation.at, self._at)
        self._trials = max(0.0, self._trials + weight)
        if observation.success:
            self._successes = max(0.0, self._successes + weight)

    def counts(self, now: float) -> tuple[float, float]:
        """Return successes and trials, as weighted now."""
        if self._at is None:
            return 0.0, 0.0
        faded = self._weight(self._at, now)
        return min(self._successes, self._trials) * faded, self._trials * faded

    def _weight(self, at: float, now: float) -> float:
        return float(0.5 ** (max(0.0, now - at) / self._half_life_s))


class Evidence:
    """Everything learned so far, by task: repeated, late and replaced evidence is counted once."""

    def __init__(self, *, prior_strength: float, half_life_s: float, family: Callable[[str], str]) -> None:
        self.version = 0  # grows with every change
        self.results = self.unused = self.scores = 0  # of the tasks' ends: evidence, none; and of scores
        self._strength = prior_strength
        self._half_life_s = half_life_s
        self._family = family
        self._house = LearnedRates()
        self._cases: dict[str, Case] = {}  # by key
        self._counted: dict[str, list[Observation]] = {}
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._pairs: dict[Pair, Tally] = {}  # deliveries by task type and family

    def note_result(
        self,
        task: str,
        task_type: TaskType,
        model: str,
        status: ResultStatus,
        at: float,
        code: ErrorCode | None = None,
    ) -> None:
        """Apply how a task ended, and why if it failed."""
        known = self._cases.get(task)
        ended = Case(task_type=task_type, model=model, status=status, code=code, ended_at=at)
        self._note(task, msgspec.structs.replace(ended, score=known.score) if known is not None else ended)

    def note_score(self, score: Score) -> None:
        """Apply upstream's score of a task; a later one replaces it."""
        known = self._cases.get(score.task)
        if known is None or known.status is None:
            self._note(score.task, Case(task_type=score.task_type, model=score.model, score=score))
        else:  # the job's type and model count
            self._note(score.task, msgspec.structs.replace(known, score=score))

    def score_of(self, task: str) -> Score | None:
        """Return upstream's score of a task, if one was received."""
        case = self._cases.get(task)
        return case.score if case is not None else None

    def forget_scores(self) -> None:
        """Undo all scores, because their stream was replaced."""
        for task, case in list(self._cases.items()):
            if case.score is not None:
                self._note(task, msgspec.structs.replace(case, score=None))

    def tables(self, now: float) -> LearnedRates:
        """Return the current rates."""
        learned: dict[str, dict[str, Rate]] = {name: {} for name in MEANINGS}
        for (name, key), tally in self._tallies.items():
            successes, trials = tally.counts(now)
            if trials >= FADED:
                house = getattr(self._house, name).house
                learned[name][key] = self._rate(name, house, successes, trials)
        made = {name: Table(getattr(self._house, name).house, learned[name]) for name in MEANINGS}
        return LearnedRates(**made, delivery=self._delivery(now))

    def _delivery(self, now: float) -> Table:
        """Return the delivery rates of pairs of task type and family."""
        counts = {pair: Counts(*tally.counts(now)) for pair, tally in self._pairs.items()}
        known = {pair: found for pair, found in counts.items() if found.trials >= FADED}
        return delivery_table(known, self._house.delivery.house, self._strength)

    def _rate(self, name: str, house: float, successes: float, trials: float) -> Rate:
        cause = (
            f"{successes:.1f} of {trials:.1f} {MEANINGS[name]} (evidence halves every "
            f"{self._half_life_s / DAY_S:g} days), prior {house * self._strength:.4g} of {self._strength:g}"
        )
        return Rate(Counts(successes, trials).posterior(house, self._strength), cause, successes, trials)

    def _note(self, task: str, case: Case) -> None:
        known = self._cases.get(task)
        if known == case:
            return
        self._cases[task] = case
        if known is not None:
            self._count(known, self._counted[task], -1)
        self._counted[task] = observations(case, self._family(case.model))
        self._count(case, self._counted[task], 1)
        self.version += 1

    def _count(self, case: Case, found: list[Observation], sign: int) -> None:
        self.scores += sign * (case.score is not None)
        self.results += sign * (case.status is not None and bool(found))
        self.unused += sign * (case.status is not None and not found)
        for each in found:
            tallies = [self._tallies.setdefault((each.table, each.key), Tally(self._half_life_s))]
            if each.table == "task_success":
                pair = (str(case.task_type), self._family(case.model))
                tallies.append(self._pairs.setdefault(pair, Tally(self._half_life_s)))
            for tally in tallies:
                tally.add(each, sign)
