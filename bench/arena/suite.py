"""The arena's fixed list of tasks: every data set on every small model, three budgets, clean and damaged."""

from __future__ import annotations

import itertools

from bench.arena.damage import WAYS
from bench.arena.models import MODELS
from bench.arena.task import Task

# So many that one epoch has about 10,000 tokens.
ROWS = {
    "wordnet": 250,
    "foldoc": 90,
    "german_english": 400,
    "messages": 200,
    "python_code": 40,
    "manual_pages": 60,
    "fortunes": 120,
    "emoji_json": 200,
}
BUDGETS = (0.5, 2.0, 6.0)  # epochs
DAMAGED_BUDGETS = (2.0, 6.0)
SMOLLM2_TASKS = {"wordnet": 120, "german_english": 200, "messages": 100, "foldoc": 40}
SMOLLM2_BUDGET = 2.0


def cpu_suite() -> list[Task]:
    """The 68 tasks of `--suite cpu`; the rows of a data set differ from one to the next."""
    clean = [
        Task(source, model, ROWS[source], budget, seed)
        for (source, model), (seed, budget) in itertools.product(_pairs(), enumerate(BUDGETS))
    ]
    damaged = [
        Task(source, model, ROWS[source], DAMAGED_BUDGETS[number % 2], 3, WAYS[number // 2 % len(WAYS)])
        for number, (source, model) in enumerate(_pairs())
    ]
    large = [Task(source, "smollm2", rows, SMOLLM2_BUDGET, 0) for source, rows in SMOLLM2_TASKS.items()]
    return [*clean, *damaged, *large]


SUITES = {"cpu": cpu_suite}


def _pairs() -> list[tuple[str, str]]:
    return list(itertools.product(ROWS, MODELS))
