"""Which rows count as copies of each other, and which only share a prompt or a form."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer_node.engine.data import near_duplicates
from trainer_node.engine.data.near_duplicates import IGNORED

Row = tuple[list[int], list[int]]  # prompt, completion
RANDOM = np.random.default_rng(0)


def tokens(count: int) -> list[int]:
    """Return random tokens."""
    return RANDOM.integers(10, 30_000, count).tolist()


def changed(text: list[int], *places: int) -> list[int]:
    """Return the text with other tokens at some places."""
    return [9 if place in places else token for place, token in enumerate(text)]


def groups(rows: list[Row], most: int = 20) -> list[list[int]]:
    """Return the groups that are found."""
    ids: NDArray[np.int32] = np.array(
        [token for prompt, answer in rows for token in prompt + answer], np.int32
    )
    labels = np.array([one for prompt, answer in rows for one in [IGNORED] * len(prompt) + answer], np.int32)
    borders = np.cumsum([0] + [len(prompt) + len(answer) for prompt, answer in rows])
    return near_duplicates.near_duplicates(ids, labels, borders, most)


def test_completions_with_a_changed_word_are_a_group_whatever_their_prompts() -> None:
    rows: list[Row] = [(tokens(10), tokens(40)) for _ in range(50)]
    rows[30] = (tokens(10), changed(rows[3][1], 20, 21))
    rows[40] = (tokens(10), changed(rows[3][1], 5, 30))
    rows[41] = (rows[7][0], rows[7][1])
    assert groups(rows) == [[3, 30, 40], [7, 41]]


def test_one_system_prompt_and_one_form_of_answer_make_no_group() -> None:
    system, greeting, farewell = tokens(200), tokens(20), tokens(20)
    assert groups([(system + tokens(10), tokens(40)) for _ in range(100)]) == []
    assert groups([(system + tokens(10), [7]) for _ in range(100)]) == []
    assert groups([(system, greeting + tokens(10) + farewell) for _ in range(100)]) == []
    few: list[Row] = [(system, tokens(40)) for _ in range(5)]
    assert groups(few) == []  # too few for a form


def test_rows_with_short_answers_are_compared_as_a_whole() -> None:
    text, question = tokens(100), tokens(20)
    assert groups([(text, [7]), (changed(text, 50), [7]), (tokens(100), [7])]) == [[0, 1]]
    assert groups([(text, [7]), (changed(text, 50), [8]), (tokens(100), [7])]) == []  # another class
    others: list[Row] = [(text + tokens(20), [7]) for _ in range(4)]
    assert groups([(text + question, [7]), *others]) == []  # another question about one text


def test_many_copies_are_a_form_and_so_is_a_long_chain() -> None:
    text = tokens(60)
    assert groups([(tokens(5), changed(text, place)) for place in range(20)], most=20) == [[*range(20)]]
    assert groups([(tokens(5), changed(text, place)) for place in range(21)], most=20) == []
    chain = tokens(200)
    assert groups([([], chain[place : place + 60]) for place in range(0, 140, 7)], most=19) == []
    assert groups([([], text), ([], text)], most=1) == []


def test_rows_without_a_run_and_no_rows() -> None:
    assert groups([([1], [2]), ([1], [2]), ([], [3, 4])]) == []
    assert groups([]) == []


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = [(tokens(10), tokens(40)) for _ in range(50)]
    rows += [(tokens(10), changed(answer, 9)) for _, answer in rows[:20]]
    whole = groups(rows)
    assert whole == [[row, 50 + row] for row in range(20)]
    monkeypatch.setattr(near_duplicates, "CHUNK", 100)
    monkeypatch.setattr(near_duplicates, "CHUNK_ROWS", 7)
    assert groups(rows) == whole
    monkeypatch.setattr(near_duplicates, "CHUNK", 10)  # less than a row
    assert groups(rows) == whole


@pytest.mark.parametrize("last", [1, 2, 4, 5])
def test_a_last_chunk_may_be_shorter_than_a_run(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "CHUNK", 100)
    rows: list[Row] = [([], tokens(50)) for _ in range(4)]
    assert groups([*rows, ([], tokens(last))]) == []
    assert groups([*rows, *(([1], [row]) for row in range(last))]) == []


def test_long_rows_are_found_by_a_part_of_their_runs() -> None:
    rows: list[Row] = [(tokens(10), tokens(2000)) for _ in range(20)]
    rows.append((tokens(10), changed(rows[4][1], *range(100, 1900, 100))))
    assert groups(rows) == [[4, 20]]
