"""The clock decides: learning rate, end of training, when to save and what to skip when time is short.

Nothing here reads a clock or a file; times come in as numbers, so that every rule can be tested anywhere.
"""

from __future__ import annotations

import math
import statistics

from msgspec import Struct

from shared.planning.throughput import SAFETY, SLACK_S, Costs

FIRST_SAVE = 0.10  # of the budget: by then something submittable is on disk
SAVE_SHARE = 0.02  # of the run time may be spent saving
RECENT = 50  # steps that the 95th percentile is taken over


class Shape(Struct, frozen=True):
    """How the learning rate rises and falls, as shares of its peak."""

    warmup: float
    decay: str = "linear"  # linear, cosine or constant
    floor: float = 0.0

    def at(self, progress: float) -> float:
        """Return the rate at `progress`: linear up to 1 at `warmup`, then down to exactly `floor` at 1."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.decay == "constant":
            return 1.0
        left = (1.0 - progress) / (1.0 - self.warmup) if progress < 1.0 else 0.0
        if self.decay == "cosine":
            left = 0.5 * (1.0 - math.cos(math.pi * left))
        return self.floor + (1.0 - self.floor) * left


class Cooldown(Struct, frozen=True):
    """An early end: the rate falls to zero from where it stood."""

    tokens: int  # trained when it began
    progress: float  # then
    length: int  # tokens that it takes


class ScheduleState(Struct, kw_only=True):
    """What the schedule must remember across a restart; part of every checkpoint."""

    begun_at: float  # when the first step began
    progress: float = 0.0
    step_s: list[float] = []  # durations of the latest steps
    saved_at: float | None = None  # when the newest checkpoint was begun
    saving_s: float = 0.0  # what all saves together kept from training
    cooldown: Cooldown | None = None


class Schedule:
    """Progress of one run from 0 to 1, never backwards, and what follows from it."""

    def __init__(
        self,
        state: ScheduleState,
        costs: Costs,
        *,
        start_at: float,
        ready_by: float,
        max_tokens: float,
        shape: Shape,
        expected_steps: int,
        interval_s: float,
        most_steps: int | None = None,
    ) -> None:
        self.state = state
        self.costs = costs
        self.start_at = start_at
        self.ready_by = ready_by
        self.max_tokens = max_tokens
        self.shape = shape
        self.expected_steps = expected_steps
        self.interval_s = interval_s
        self.most_steps = most_steps
        self._save_costs_s = costs.save_s  # what one save keeps from training

    @property
    def step_s(self) -> float:
        """95th percentile of the latest step durations, at most 3 medians; 0 before the first step.

        The bound is for the first step, which can take ten times as long as the others, while there are few.
        """
        durations = sorted(self.state.step_s)
        if not durations:
            return 0.0
        return min(durations[int(0.95 * (len(durations) - 1) + 0.5)], 3 * statistics.median(durations))

    @property
    def end_at(self) -> float:
        """Return when training must end: the rest until `ready_by` is for one late step and the closing.

        One SLACK_S more than the closing asks for: freeing the optimiser's memory comes before it.
        """
        return self.ready_by - SAFETY * self.step_s - self.costs.closing_s - 2 * SLACK_S

    def update(self, now: float, tokens: int, steps: int = 0) -> float:
        """Progress at `now`: the largest share, of the time, of the most tokens or of the most steps.

        In a cool-down the share of the tokens is that of what was left when it began.
        """
        begun, cooldown = self.state.begun_at, self.state.cooldown
        elapsed = (now - begun) / (self.end_at - begun) if self.end_at > begun else 1.0
        share = max(tokens / self.max_tokens, steps / self.most_steps if self.most_steps else 0.0)
        if cooldown:
            done = (tokens - cooldown.tokens) / cooldown.length
            share = cooldown.progress + (1.0 - cooldown.progress) * done
        self.state.progress = min(1.0, max(self.state.progress, elapsed, share))
        return self.state.progress

    def cool_down(self, tokens: int, length: int) -> None:
        """Let the rate fall to zero within `length` more tokens, or earlier if time or plan end before."""
        state = self.state
        left = int((1.0 - state.progress) * self.max_tokens)
        state.cooldown = Cooldown(tokens, state.progress, max(1, min(length, left)))

    def rate(self) -> float:
        """Return the multiplier for the step that begins now, taken at the step's middle.

        At the step's start the first step would be wasted at rate 0, at its end the last one: of a hundred
        steps two.
        """
        if self.state.step_s and self.end_at > self.state.begun_at:
            share = statistics.median(self.state.step_s) / (self.end_at - self.state.begun_at)
        else:
            share = 1.0 / max(1, self.expected_steps)
        if self.most_steps:
            share = max(share, 1.0 / self.most_steps)
        return self.shape.at(self.state.progress + share / 2)

    def stepped(self, seconds: float) -> None:
        """Count one step that took `seconds`."""
        self.state.step_s = [*self.state.step_s, seconds][-RECENT:]

    def begin_again(self, now: float) -> None:
        """Let training begin now: the first step compiled layers, and that is no part of the warm-up."""
        self.state.begun_at, self.state.step_s = now, []

    def save_due(self, now: float) -> bool:
        """Return whether to save before the next step.

        Every `interval_s` since training began, as long as this one and the last, which is always made, keep
        within SAVE_SHARE of the time since the start. The first one is on disk by FIRST_SAVE of the budget,
        whatever it costs.
        """
        since = self.state.begun_at if self.state.saved_at is None else self.state.saved_at
        if self.state.saved_at is None:
            first_at = self.start_at + FIRST_SAVE * (self.ready_by - self.start_at)
            if now + 2 * self.step_s + SAFETY * self.costs.save_s >= first_at:
                return True
        elif now + SAFETY * self.costs.save_s >= self.end_at:
            return False  # it would not be on disk before the last one, which waits for it
        if now - since < self.interval_s:
            return False
        spent = self.state.saving_s + 2 * self._save_costs_s
        return spent <= SAVE_SHARE * (now - self.start_at)

    def save_begun(self, at: float, waited_s: float) -> None:
        """Note that a checkpoint was begun, for which training waited so long."""
        self.state.saved_at = at
        self.state.saving_s += waited_s
        self._save_costs_s = waited_s

    def saved(self, seconds: float, slowed_s: float) -> None:
        """Note that the last checkpoint is on disk after so long, and cost training `slowed_s`."""
        self.costs.save_s = seconds
        self.state.saving_s += slowed_s
        self._save_costs_s += slowed_s

    def eta_s(self, now: float) -> float:
        """Return the seconds until training ends, by the clock."""
        return max(0.0, self.end_at - now)
