"""How fast a job trains, measured before the first trial: a few steps at a rate of zero change no weight."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from shared.messages.runs import Phase
from shared.planning.profiles import resolve
from trainer_node.engine.context import LEAST_PATIENCE_S, RunContext
from trainer_node.engine.finish import free_optimizer
from trainer_node.engine.memory.oom import is_broken_device, is_out_of_memory, release
from trainer_node.engine.search.runner import TrialRunner, write_known
from trainer_node.engine.search.strategy.budget import Budget, Speed
from trainer_node.engine.search.trial import SearchRecord, Trial
from trainer_node.engine.train.loop import timed_step
from trainer_node.engine.train.oom_fallback import SmallerPlan
from trainer_node.engine.train.state import TrainState

TIMED_SHARE = 0.02  # of the time, for all steps of one batch
LONGEST = 6.0  # times TIMED_SHARE: of two sizes, and what comes before, each may take twice as long
TIMED_ROWS = 32  # with fewer, rows that happen to be short or long count for too much
# Times the fastest step: what came before the first step that is as fast doesn't count. On a CPU the first
# three to eight steps of a process take up to three times as long as later ones, while the kernel gives it
# memory. Timed by its first steps SmolLM2-135M had a batch of 8, with which it trains 186 tokens/s. With one
# of 16 it trains 260 (docs/experiments.md).
STEADY = 1.25
APART = 1.5  # times as many tokens another step must compute, to tell what a step takes besides
OTHER_BATCHES = (0.25, 4.0)  # of the first trial's
MOST_BESIDES = 0.9  # of a step
# Of a step, where one size was timed. Each step takes over half a percent of the time then, and small batches
# that cost more than they seem to leave half of the rows untrained (docs/experiments.md).
UNKNOWN_SHARE = 0.5
LONG_S = 1.0  # of a CPU's first step: what is done once, such as collecting garbage, takes .1 to .5 s


class StepTime(Struct, frozen=True):
    """What steps of one size take."""

    seconds: float  # of one step
    tokens: float  # that one computes, padding included

    @property
    def token_s(self) -> float:
        """Return the seconds for each token."""
        return self.seconds / max(1.0, self.tokens)


def is_wanted(run: RunContext, known: SearchRecord) -> bool:
    """Return whether the speed is to be measured before the next trial.

    The first one is chosen by the speed that training really has: what scoring took says little about it. The
    winner's probes measure it themselves.
    """
    return not (known.done or known.timed or run.simulated or resolve(run.job.profile).probes)


def measure_speed(run: RunContext, runner: TrialRunner, trial: Trial, budget: Budget) -> None:
    """Collective: note how fast a trial would train, and how long a step takes besides its tokens.

    If each process trains on its own (`runner` is alone), all time steps at once, and the slowest one counts.
    """
    group, began = run.process_group, run.clock.time()
    runner.known = replace(runner.known, timed=True)  # once: memory may run out in it, or a worker end
    write_known(run, runner.known)
    own = step_times(runner, trial, budget) if runner.run is run else times_alone(runner, trial, budget)
    with run.reporter.patience(max(LEAST_PATIENCE_S, LONGEST * TIMED_SHARE * budget.left_s)):
        times = slowest(group.gather_objects(own))
    if times:
        spent_s = group.broadcast_object(run.clock.time() - began)
        runner.known = with_speed(runner.known, trial.arm, times, spent_s)
        write_known(run, runner.known)
        run.reporter.message(as_message(times, budget.speed(trial)))


def times_alone(runner: TrialRunner, trial: Trial, budget: Budget) -> list[StepTime]:
    """Return the times of this process's steps; none if they fail, as the trial itself will report."""
    try:
        return step_times(runner, trial, budget)
    except Exception as failure:
        if is_broken_device(failure):
            raise
        traceback.print_exc()
    runner.forget()  # outside of the handler, which holds what the steps had in memory
    return []


def step_times(runner: TrialRunner, trial: Trial, budget: Budget) -> list[StepTime]:
    """Collective: time steps like a trial's, then of another size; none if memory runs out in the first."""
    group = runner.run.process_group
    times, examples = list[StepTime](), to_time(trial, budget)
    if group.device.type == "cpu" and len(examples) > 1:
        smaller = min(examples, key=lambda example: example.batch)
        if step_time_of(runner, smaller, budget) is None:  # it doesn't count: see STEADY
            return []
    for example in examples:
        if times and not group.broadcast_object(is_affordable(example, times[0], budget)):
            break
        step_time = step_time_of(runner, example, budget)
        if step_time is None:
            break
        times.append(step_time)
    return times


def slowest(everybody: Sequence[Sequence[StepTime]]) -> Sequence[StepTime]:
    """Return what the slowest process timed, by its first size; nothing if none timed anything."""
    timed = [times for times in everybody if times]
    return max(timed, key=lambda times: times[0].token_s, default=[])


def with_speed(known: SearchRecord, arm: str, times: Sequence[StepTime], spent_s: float) -> SearchRecord:
    """Return the record with what was timed of an arm, in `spent_s`: shares are of the time there is now."""
    speed, began_at, all_s = speed_of(times), known.began_at + spent_s, known.all_s - spent_s
    return replace(
        known,
        timed_arm=arm,
        tokens_per_s=speed.tokens_per_s,
        step_s=speed.step_s,
        began_at=began_at,
        all_s=all_s,
    )


def as_message(times: Sequence[StepTime], expected: Speed) -> str:
    """Return what was timed as a message."""
    first, step_s = times[0], speed_of(times).step_s
    besides = f", and a step takes {step_s:.2g} s besides its tokens" if len(times) > 1 else ""
    return (
        f"steps of {first.tokens:.0f} tokens take {first.seconds:.2g} s{besides}; "
        f"{first.tokens / expected.tokens_per_s:.2g} s were expected"
    )


def to_time(trial: Trial, budget: Budget) -> list[Trial]:
    """Return the trials whose steps are timed: two of unlike batches, or one if no other is unlike enough.

    Empty if timing would take too long.
    """
    mean_length = budget.epoch_tokens / budget.examples
    most_tokens = TIMED_SHARE * budget.left_s * budget.speed(trial).tokens_per_s
    most = int(most_tokens / mean_length)
    first = replace(trial, batch=max(budget.devices, min(trial.batch, most)))
    if budget.step_tokens(first) > most_tokens:
        return []
    for factor in OTHER_BATCHES:
        other = replace(trial, batch=int(factor * first.batch))
        if budget.devices <= other.batch <= max(most, first.batch):
            small, large = sorted((budget.step_tokens(first), budget.step_tokens(other)))
            if large >= APART * small:
                return [first, other]
    return [first]


def is_affordable(trial: Trial, known: StepTime, budget: Budget) -> bool:
    """Return whether a step of a trial takes little of the time, by what steps of another size took."""
    most_s = TIMED_SHARE * budget.left_s
    return budget.step_tokens(trial) * known.seconds <= most_s * max(1.0, known.tokens)


def step_time_of(runner: TrialRunner, trial: Trial, budget: Budget) -> StepTime | None:
    """Collective: time steps of a trial's batch; None if the job was asked to stop.

    Also if memory ran out: the trial itself finds out what fits.
    """
    run = runner.run
    state = runner.prepared(trial, None)
    run.reporter.phase(Phase.TRAIN)
    try:
        return _timed(run, state, TIMED_SHARE * budget.left_s, trial, budget)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not run.process_group.is_single:
            raise SmallerPlan from error  # the others wait for this process: all start again, without timing
        return None
    finally:
        runner.untouched = True  # a rate of zero changes no weight
        free_optimizer(state)
        release()


def _timed(
    run: RunContext, state: TrainState, most_s: float, trial: Trial, budget: Budget
) -> StepTime | None:
    """Collective: take steps until enough are steady, or time is over; None if told to stop.

    The first step, which does more than others, counts if that hardly shows, or if no time is left.
    """
    group = run.process_group
    long_s = LONG_S if state.device.type == "cpu" else most_s
    # Padded packs take as long, however short their few rows are.
    padded = budget.step_tokens(trial) if state.plan.pack_examples is not None else None
    state.deltas.model.train()
    taken = list[StepTime]()
    while not group.broadcast_object(
        sum(step.seconds for step in taken) > most_s or is_settled(taken, 0 if padded else trial.batch)
    ):
        before, is_first = state.tokens, state.step == 0
        step_s = _step_s(run, state)
        if step_s is None:
            return None
        taken.append(StepTime(step_s, padded or state.tokens - before))
        if is_first and (state.plan.compile or not group.broadcast_object(step_s > long_s)):
            taken.clear()
    return mean_of(steady(taken))


def is_settled(taken: Sequence[StepTime], batch: int) -> bool:
    """Return whether steps are enough to tell: two steady ones, and TIMED_ROWS of them.

    A `batch` of 0 says that each step computes as many tokens, whatever rows it has.
    """
    count = len(steady(taken))
    return count >= 2 and (not batch or count * batch >= TIMED_ROWS)


def steady(taken: Sequence[StepTime]) -> Sequence[StepTime]:
    """Return the steps from the first one on that is about as fast as the fastest."""
    most = STEADY * min((step.token_s for step in taken), default=0.0)
    first = next((place for place, step in enumerate(taken) if step.token_s <= most), 0)
    return taken[first:]


def mean_of(steps: Sequence[StepTime]) -> StepTime:
    """Return the mean step."""
    count = len(steps)
    return StepTime(sum(step.seconds for step in steps) / count, sum(step.tokens for step in steps) / count)


def _step_s(run: RunContext, state: TrainState) -> float | None:
    """Return the seconds of one step at a rate of zero, with all that the device does; None if stopped."""
    began = run.own_clock.time()
    if not timed_step(state, 0.0, run.stop):
        return None
    state.read_results()
    return run.own_clock.time() - began


def speed_of(times: Sequence[StepTime]) -> Speed:
    """Return the speed of steps; what one takes besides its tokens is a guess from one size."""
    in_order = sorted(times, key=lambda one: one.tokens)
    small, large = in_order[0], in_order[-1]
    step_s = UNKNOWN_SHARE * small.seconds
    if large.tokens > small.tokens:
        token_s = max(0.0, large.seconds - small.seconds) / (large.tokens - small.tokens)
        most_s = MOST_BESIDES * min(small.seconds, large.seconds)
        step_s = min(most_s, max(0.0, small.seconds - token_s * small.tokens))
    return Speed(large.tokens / max(1e-9, large.seconds - step_s), step_s)
