"""A task's rows, with and without the packages that they come from."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.arena import task as tasks
from bench.arena.kinds.conversations import Conversation
from bench.arena.kinds.pairs import PreferencePair
from bench.arena.rows import Row
from bench.arena.task import Task, pack_rows, rows_of

DRAW = random.Random(0)
WORDS = [first + last for first in ("ba", "ke", "li", "mo") for last in ("dor", "fin", "gat", "rel", "zon")]
ROWS = [
    Row(f"say {' '.join(DRAW.choices(WORDS, k=6))}", " ".join(DRAW.choices(WORDS, k=12))) for _ in range(400)
]


def test_packed_rows_make_the_same_task_without_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "load", lambda source, cache: ROWS)
    task = Task("wordnet", "smollm2", 50, 2.0, 3)
    known = rows_of(task, tmp_path)
    pack_rows("wordnet", tmp_path, tmp_path / "there")

    def fail(source: str, cache: Path) -> list[Row]:
        raise AssertionError("no package can be fetched there")

    monkeypatch.setattr(tasks, "load", fail)
    assert rows_of(task, tmp_path / "there") == known
    assert len(known[0]) == 50
    assert known[1]
    assert not set(known[0]) & set(known[1])


def test_no_test_conversation_shares_a_row_with_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "load", lambda source, cache: ROWS)
    train, test = rows_of(Task("wordnet", "llama", 100, 2.0, 3, kind="chat"), tmp_path)
    assert len(train) == 100
    said = [
        {message.content for one in side if isinstance(one, Conversation) for message in one.messages}
        for side in (train, test)
    ]
    assert all(said)
    assert not said[0] & said[1]


def test_no_test_pair_has_a_completion_of_a_training_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "load", lambda source, cache: ROWS)
    train, test = rows_of(Task("wordnet", "llama", 100, 2.0, 3, kind="dpo"), tmp_path)
    assert len(train) == 100
    known, scored = (
        {text for one in side if isinstance(one, PreferencePair) for text in (one.chosen, one.rejected)}
        for side in (train, test)
    )
    assert scored
    assert not known & scored


def test_a_data_set_is_read_once_for_all_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def load(source: str, cache: Path) -> list[Row]:
        read.append(source)
        return ROWS

    monkeypatch.setattr(tasks, "load", load)
    first, second = (rows_of(Task("wordnet", "llama", 50, 2.0, seed), tmp_path) for seed in (0, 1))
    assert first[0] != second[0]
    assert first[1] == second[1]
    assert read == ["wordnet"]
