"""The arena's fixed lists of tasks.

`cpu`: every data set on every small model, three budgets, clean and damaged. `kinds`: what a tournament has
besides plain instruct tasks.
"""

from __future__ import annotations

import itertools

from bench.arena.damage import WAYS
from bench.arena.kinds.kind import Kind
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

# Of the kinds that tournaments have besides instruct, with the coefficient of the divergence.
KIND_ROWS: dict[tuple[Kind, float], int] = {
    ("dpo", 0.0): 200,
    ("chat", 0.0): 200,
    ("kl", 0.3): 250,
    ("kl", 1.0): 250,
}
KIND_SOURCES = ("wordnet", "messages")  # in turn: with each model one at either budget
KIND_BUDGETS = (2.0, 6.0)


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


def kinds_suite() -> list[Task]:
    """The 16 tasks of `--suite kinds`: each kind meets both models with both budgets."""
    parts = itertools.product(KIND_ROWS, enumerate(MODELS), enumerate(KIND_BUDGETS))
    return [
        Task(KIND_SOURCES[(first + seed) % 2], model, KIND_ROWS[kind], budget, seed, None, *kind)
        for kind, (first, model), (seed, budget) in parts
    ]


SUITES = {"cpu": cpu_suite, "kinds": kinds_suite}


def _pairs() -> list[tuple[str, str]]:
    return list(itertools.product(ROWS, MODELS))
