"""What the next trials of a search may cost, from what those before them took."""

from __future__ import annotations

from shared.planning.memory_fit import round_up
from shared.planning.throughput import SLACK_S
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.search.runner import end_at, is_averaged
from trainer_node.engine.search.strategy import Budget, is_tiny
from trainer_node.engine.search.trial import SearchRecord


def budget_of(run: RunContext, record: RunRecord, known: SearchRecord, data: JobData) -> Budget:
    """Return what is left, at the speed of the trials so far. Every process must call it."""
    longest = int(data.train.lengths.max())
    trained_s = sum(one.train_s for one in known.done)
    tokens = sum(one.tokens for one in known.done)
    first = next(iter(known.plans.values()))
    speed = tokens / trained_s if tokens and trained_s > 0 else first.expected_tokens_per_s
    if run.simulated:
        speed = run.job.token_clock_rate / known.width
    other = [one.other_s for one in known.done] or [record.costs.score_s + SLACK_S]
    return Budget(
        left_s=end_at(run, record) - run.clock.time(),
        tokens_per_s=speed,
        epoch_tokens=record.train_tokens,
        examples=record.train_examples,
        trial_s=0.0 if run.simulated else sum(other) / len(other),
        all_s=known.all_s,
        score_s=0.0 if run.simulated else record.costs.score_s,
        all_rows=1.0 + int(data.dev.lengths.sum()) / record.train_tokens,
        single=frozenset(arm for arm, plan in known.plans.items() if not is_averaged(plan)),
        least_batch=first.devices * round_up(longest) * record.train_examples / record.train_tokens,
        width=known.width,
        tiny=is_tiny(first),
    )
