"""How uneven a task's completions are: where a mean over tokens and one over rows differ."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from bench.arena.kinds.kind import FORMS
from bench.arena.task import Task, model_folder, rows_of
from trainer_node.engine.data.examples import IGNORED, Examples, longest_row, tokenize
from trainer_node.engine.model.loading import load_config, load_tokenizer


def spread_of(task: Task, cache: Path) -> float:
    """Return the coefficient of variation of the label tokens of a task's training rows."""
    form, model = FORMS[task.kind], str(model_folder(task, cache))
    rows = [msgspec.to_builtins(row) for row in rows_of(task, cache)[0]]
    length = longest_row(load_config(model), form.task_type, form.scorer)
    tokenizer = load_tokenizer(model)
    return variation(tokenize(rows, form.task_type, form.columns, tokenizer, length, scorer=form.scorer)[0])


def variation(examples: Examples) -> float:
    """Return the standard deviation of the examples' label tokens over their mean."""
    counts = np.add.reduceat(examples.labels != IGNORED, examples.offsets[:-1], dtype=np.int64)
    return float(counts.std() / counts.mean())
