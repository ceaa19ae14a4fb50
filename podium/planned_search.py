"""What a search would try of a job, by its plans alone: what `podium plan` says of it."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from shared.messages.offers import TaskType
from shared.planning.plan import DataStats, Plan
from shared.planning.step_size import full_batch
from shared.planning.throughput import development_rows
from trainer_node.engine.search.strategy.budget import Budget, Speed, is_ample, is_averaged, is_low_rank
from trainer_node.engine.search.strategy.first_trial import arm_name, first_trial, trial_of
from trainer_node.engine.search.strategy.neighbours import LEAST_EPOCHS, START_EPOCHS
from trainer_node.engine.search.strategy.next_trial import next_trial
from trainer_node.engine.search.strategy.population import is_population, on_one_device
from trainer_node.engine.search.strategy.prior import is_tiny
from trainer_node.engine.search.strategy.probes import PROBE_TRIALS
from trainer_node.engine.search.strategy.short_trials import MOST_UNSEEN, SHORT_TRIALS
from trainer_node.engine.search.trial import TrialResult
from trainer_node.engine.search.winner import rate_search


class Scoring(Struct, frozen=True):
    """What a job is scored by."""

    task_type: TaskType = TaskType.INSTRUCT
    divergence: bool = False  # from the base model is a part of it

    @property
    def pairs(self) -> bool:
        """Return whether the rows are preference pairs."""
        return self.task_type is TaskType.DPO


TEXT = Scoring()


def search_of(arms: Sequence[Plan], stats: DataStats, scoring: Scoring = TEXT) -> str:
    """Return what a search would try first, and how often; `arms` has the job's own plan first."""
    plan, methods = arms[0], ", or ".join(map(arm_name, arms))
    budget, alone = _budgets(arms, stats, scoring)
    start = [trial_of(arm_name(arm), arm, stats.tokens / stats.examples) for arm in arms]
    sides = all(arm.parallel != "fsdp2" for arm in arms) and is_population(start, alone)
    first = first_trial(start, alone if sides else budget)
    runs = plan.train_s / budget.cost_s(first)
    if first.main:
        after = ", then one pass over the development rows" if first.leaves_s else ""
        return f"One training run ({first.arm}, {first.epochs:.1f} epochs){after}: no time to compare."
    again = "is run again on all rows, and submitted." if budget.refits(first, 1) else "is submitted."
    if first.short:
        most = START_EPOCHS[1]
        rate = "a third of its rate, or three times it" if scoring.pairs else "the rate that it asks for"
        then = f"First: {first}; then at {rate}: three short runs at most."
        if not budget.refits(first, 1) and (runs - SHORT_TRIALS) * first.epochs <= MOST_UNSEEN:
            return f"{then} One long run takes the rest of the time."
        return (
            f"{then} Then whole runs by {methods}: there "
            f"is time for about {runs * first.epochs / most:.0f} runs of {most:g} epochs. "
            f"The best one on the development rows {again}"
        )
    if first.epochs < LEAST_EPOCHS:
        probes = f"Up to {PROBE_TRIALS} short runs of {first.epochs:.2f} epochs compare rates"
        return f"{probes}; one long run takes the rest of the time."
    left = replace(budget, left_s=budget.left_s - budget.cost_s(first))
    done = TrialResult(trial=first, loss=1.0, tokens=0, train_s=0.0)
    if not sides and (after_it := next_trial(start, [done], left)) and after_it.refit:
        return f"First: {first}. It is run again on all rows, and that run is submitted: no time to compare."
    return (
        f"First: {first}. Then its neighbours in rate, epochs and batch, by {methods}: there is time for "
        f"about {runs:.0f} runs of this length. The best one on the development rows {again}"
    )


def probes_of(arms: Sequence[Plan], stats: DataStats, scoring: Scoring = TEXT) -> str:
    """Return how a search by probes would begin, and what comes after them."""
    if all(arm.parallel == "fsdp2" for arm in arms):
        return "One training run: with no method do the weights fit one device whole."
    plan = next(arm for arm in arms if arm.parallel != "fsdp2")
    start = rate_search.trial_of(arm_name(plan), plan, stats.tokens / stats.examples)
    judge = rate_search.OF_PAIRS if scoring.pairs else rate_search.OF_TEXT
    first = rate_search.next_trial(start, [], _budget(plan, stats, scoring), judge)
    if first is None or first.main:
        return "One training run at the plan's rate: there is no time to compare rates."
    steps = first.epochs * stats.examples / first.batch
    return (
        f"Probes of about {steps:.0f} steps at constant rates take at most a fifth of the time. One run "
        "takes the rest, at the highest rate whose probe is hardly worse than the best one. The rate that "
        "they begin with comes from the size of the weights, once the model is loaded."
    )


def _budgets(arms: Sequence[Plan], stats: DataStats, scoring: Scoring) -> tuple[Budget, Budget]:
    """Return what a search may cost with all devices in each trial, and with a trial on each."""
    low = [arm for arm in arms if is_low_rank(arm) and not scoring.pairs]
    single = frozenset(arm_name(arm) for arm in arms if not is_averaged(arm))
    lora = frozenset(map(arm_name, low))
    ample = frozenset(arm_name(arm) for arm in low if is_ample(arm, arms[0], stats.label_tokens))
    together, alone = (
        replace(
            _budget(plans[0], stats, scoring),
            single=single,
            lora=lora,
            ample=ample,
            others={arm_name(arm): Speed(arm.expected_tokens_per_s) for arm in plans[1:]},
        )
        for plans in (arms, list(map(on_one_device, arms)))
    )
    return together, replace(alone, width=arms[0].devices)


def _budget(plan: Plan, stats: DataStats, scoring: Scoring) -> Budget:
    """Return what a search may cost, by the plan's estimates."""
    return Budget(
        left_s=plan.train_s,
        tokens_per_s=plan.expected_tokens_per_s,
        epoch_tokens=stats.tokens,
        examples=stats.examples,
        trial_s=0.0,
        all_s=plan.train_s,
        all_rows=1.0 + development_rows(stats.examples) / stats.examples,
        least_batch=full_batch(
            plan.devices, min(stats.max_length, plan.max_length), stats.tokens / stats.examples
        ),
        devices=plan.devices,
        pairs=scoring.pairs,
        tiny=is_tiny(plan),
    )
