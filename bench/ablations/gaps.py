"""The table of ablations: each variant's gap to its group's first one, also over kinds of tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from bench.ablations.trainer import VariantResult
from bench.ablations.variants import GROUPS, Variant
from bench.arena.task import Task

RESAMPLES = 2000
BY_SPREAD = "loss"  # the group that is judged by the spread of the completions' lengths, too

Results = Mapping[Task, Mapping[Variant, VariantResult]]


class Gap(Struct, frozen=True):
    """A variant against the first one of its group, over all tasks that have both."""

    group: str
    variant: str
    nat: float  # mean gap; negative: better
    low: float
    high: float
    better: int  # tasks with a lower mean
    tasks: int  # the seeds of one count once
    diverged: int  # runs

    def __str__(self) -> str:
        if not self.tasks:
            return f"{self.group:34} {self.variant:52} not run"
        interval = f"[{self.low:+.4f}, {self.high:+.4f}]"
        lost = f", {self.diverged} diverged" if self.diverged else ""
        return (
            f"{self.group:34} {self.variant:52} {self.nat:+.4f} {interval}  "
            f"better on {self.better} of {self.tasks}{lost}"
        )


def gap(group: str, variant: Variant, base: Variant, known: Results) -> Gap:
    """Return a variant's gap to its group's first one; a run that diverged counts in no mean.

    The seeds of a task score the same rows: each row counts with its mean over them.
    """
    pairs = {
        task: (found[base].losses, found[variant].losses)
        for task, found in known.items()
        if base in found and variant in found
    }
    by_task: dict[Task, list[NDArray[np.float64]]] = defaultdict(list)
    for task, (first, mine) in pairs.items():
        if first and mine:
            by_task[_any_seed(task)].append(np.array(mine) - np.array(first))
    gaps = [np.mean(seeds, axis=0) for seeds in by_task.values()]
    low, high = interval(gaps) if gaps else (0.0, 0.0)
    return Gap(
        group,
        variant.name,
        float(np.mean([one.mean() for one in gaps])) if gaps else 0.0,
        low,
        high,
        sum(bool(one.mean() < 0) for one in gaps),
        len(gaps),
        sum(not mine for _, mine in pairs.values()),
    )


def interval(gaps: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Return the 95% interval of the mean gap, by resampling tasks and then each one's rows."""
    random = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = random.integers(0, len(gaps), len(gaps))
        rows = [gaps[task][random.integers(0, len(gaps[task]), len(gaps[task]))].mean() for task in drawn]
        means[number] = np.mean(rows)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def table(groups: Sequence[str], known: Results, spreads: Mapping[Task, float]) -> list[Gap]:
    """Return every comparison, over all tasks and over the kinds that a group is judged on apart."""
    found = []
    for name in groups:
        base, *others = GROUPS[name]
        for kind, some in _kinds(name, known, spreads):
            found += [gap(f"{name}{kind}", variant, base, some) for variant in others]
    return found


def _kinds(group: str, known: Results, spreads: Mapping[Task, float]) -> Iterator[tuple[str, Results]]:
    yield "", known
    for word, damaged in (("clean", False), ("damaged", True)):
        if some := {task: one for task, one in known.items() if bool(task.damage) is damaged}:
            yield f", {word}", some
    if group == BY_SPREAD:
        small, large = by_spread(known, spreads)
        yield ", small spread", small
        yield ", large spread", large


def by_spread(known: Results, spreads: Mapping[Task, float]) -> tuple[Results, Results]:
    """Return the half of the tasks with the smaller spreads, and the other; a task's seeds stay together."""
    seeds: dict[Task, list[Task]] = defaultdict(list)
    for task in known:
        seeds[_any_seed(task)].append(task)
    ordered = sorted(seeds.values(), key=lambda those: np.mean([spreads[task] for task in those]))
    half = len(ordered) // 2
    small, large = ({task: known[task] for task in chain(*part)} for part in (ordered[:half], ordered[half:]))
    return small, large


def _any_seed(task: Task) -> Task:
    return replace(task, seed=0)


def summary(found: Sequence[Gap], tasks: int) -> dict[str, Any]:
    """Return the figures of the last line."""
    rows = {
        f"{one.group}: {one.variant}": [round(x, 4) for x in (one.nat, one.low, one.high)] for one in found
    }
    return {"tasks": tasks, "diverged": sum(one.diverged for one in found), "gaps": rows}
