"""The arena's fixed lists of tasks."""

from collections import Counter

from bench.arena.models import MODELS
from bench.arena.sources import SOURCES
from bench.arena.suite import BUDGETS, KIND_BUDGETS, KIND_ROWS, KIND_SOURCES, ROWS, cpu_suite, kinds_suite


def test_every_data_set_meets_every_model_and_budget_and_a_damaged_base() -> None:
    tasks = cpu_suite()
    assert len(set(tasks)) == len(tasks) == 68
    assert set(ROWS) == set(SOURCES)
    clean = [task for task in tasks if task.damage is None and task.model != "smollm2"]
    assert {(task.source, task.model, task.epochs) for task in clean} == {
        (source, model, budget) for source in SOURCES for model in MODELS for budget in BUDGETS
    }
    damaged = [task for task in tasks if task.damage]
    assert Counter(task.damage for task in damaged) == {
        "noise": 4,
        "scaling": 4,
        "pruning": 4,
        "reinit": 4,
    }
    assert len({task.source for task in damaged}) == len(SOURCES)
    assert sum(task.model == "smollm2" for task in tasks) == 4


def test_every_other_kind_meets_every_model_budget_and_data_set() -> None:
    tasks = kinds_suite()
    assert len(set(map(str, tasks))) == len(tasks) == 16
    assert {(task.kind, task.kl_coefficient, task.model, task.epochs) for task in tasks} == {
        (*kind, model, budget) for kind in KIND_ROWS for model in MODELS for budget in KIND_BUDGETS
    }
    for kind in KIND_ROWS:
        for budget in KIND_BUDGETS:
            found = [
                task for task in tasks if (task.kind, task.kl_coefficient, task.epochs) == (*kind, budget)
            ]
            assert {task.source for task in found} == set(KIND_SOURCES)
