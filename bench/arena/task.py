"""A task of the arena, its base model and its rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from bench.arena.damage import Way, damage_folder
from bench.arena.kinds.conversations import Conversation, conversations
from bench.arena.kinds.kind import Kind
from bench.arena.kinds.pairs import PreferencePair, pairs
from bench.arena.models import base_model
from bench.arena.rows import Row, Split, split
from bench.arena.sources import load

SMOLLM2 = Path.home() / ".cache" / "podium" / "smollm2-135m-instruct"
MOST_TEST = 300

TaskRow = Row | Conversation | PreferencePair


class Task(Struct, frozen=True, order=True):
    """One task of the arena."""

    source: str
    model: str
    rows: int
    epochs: float  # the budget
    seed: int
    damage: Way | None = None  # of the base model
    kind: Kind = "instruct"
    kl_coefficient: float = 0.0  # of the kind kl
    prices: str = ""  # of steps and scores; without, only trained tokens take time

    def __str__(self) -> str:
        model = f"{self.model} ({self.damage})" if self.damage else self.model
        kind = f"{self.kind} {self.kl_coefficient:g}" if self.kind == "kl" else self.kind
        rows = self.source if self.kind == "instruct" else f"{self.source} ({kind})"
        prices = f", {self.prices} prices" if self.prices else ""
        return f"{rows} on {model}, {self.rows} rows, {self.epochs:g} epochs, seed {self.seed}{prices}"


def model_folder(task: Task, cache: Path) -> Path:
    """The base model's folder: one of the arena's own, or the demo's SmolLM2-135M (`make setup`)."""
    clean = SMOLLM2 if task.model == "smollm2" else base_model(task.model, cache)
    if task.damage is None:
        return clean
    seed = damage_seed(task)
    folder = cache / "models" / f"{task.model}-{task.damage}-{seed}"
    if not (folder / "damage.json").exists():
        damage_folder(clean, folder, seed, task.damage)
    return folder


def damage_seed(task: Task) -> int:
    """A damage of its own for every task of a model."""
    return sum(f"{task.source} {task.seed}".encode())


def rows_of(task: Task, cache: Path) -> tuple[Sequence[TaskRow], Sequence[TaskRow]]:
    """The task's training and test rows; the seed decides which of the data set's rows are trained on.

    What a row of the task is made of is all on one side: rows of the data set to train on, or to score on.
    """
    parts = parts_of(task.source, cache)
    order = np.random.default_rng(task.seed).permutation(len(parts.train))
    train = [parts.train[number] for number in order]
    if task.kind == "chat":
        return conversations(train, task.rows), conversations(parts.test)
    if task.kind == "dpo":
        return pairs(train[: task.rows]), pairs(parts.test)
    return train[: task.rows], parts.test


def parts_of(source: str, cache: Path) -> Split:
    """A data set's rows to train on and to score on; as `pack_rows` wrote them into the cache, if it did."""
    packed = packed_path(source, cache)
    if packed.exists():
        return msgspec.json.decode(packed.read_bytes(), type=Split)
    return _split_of(source, cache)


@functools.cache
def _split_of(source: str, cache: Path) -> Split:
    """Read and split a data set once: that takes seconds, and many tasks want the same one."""
    return split(load(source, cache), most_test=MOST_TEST)


def pack_rows(source: str, cache: Path, folder: Path) -> Path:
    """Write a data set's rows, for a machine that can fetch no packages: there the folder is the cache."""
    path = packed_path(source, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(parts_of(source, cache)))
    return path


def packed_path(source: str, cache: Path) -> Path:
    """Where a data set's packed rows are."""
    return cache / "rows" / f"{source}.json"
