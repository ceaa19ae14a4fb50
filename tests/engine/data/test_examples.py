"""Examples of rows: what is said if there are none, and how they are taken."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shared.errors import DataError
from shared.messages.offers import DatasetType, TaskType
from tests.engine.data.conftest import document
from trainer_node.engine.data.examples import Examples, scored_length, tokenize

INSTRUCT = DatasetType(field_instruction="ask", field_output="say")


def test_a_missing_column_is_named_with_those_that_are_there(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"d.json: no row has the column 'say'; .* row 1 are 'ask', 'answer'"):
        tokenize([{"ask": "a", "answer": "b"}], TaskType.INSTRUCT, INSTRUCT, tokenizer, 256, source="d.json")
    url = "https://h.example/d.json?X-Amz-Signature=secret"  # the signature must not show
    with pytest.raises(DataError, match=r"^https://h\.example/d\.json: no row"):
        tokenize([{"ask": "a"}], TaskType.INSTRUCT, INSTRUCT, tokenizer, 256, source=url)
    with pytest.raises(DataError, match="names no column: field_instruction"):
        tokenize([{"ask": "a"}], TaskType.INSTRUCT, DatasetType(field_output="say"), tokenizer, 256)


def test_no_usable_row_says_why(tokenizer: Any) -> None:
    rows = [{"ask": "one", "say": ""}, {"ask": "one", "say": "word " * 100}]
    with pytest.raises(DataError, match=r"no usable row among 2: .*empty \(1, first row 1\); longer than 16"):
        tokenize(rows, TaskType.INSTRUCT, INSTRUCT, tokenizer, 16)


def test_the_highest_token_of_each_example() -> None:
    offsets = np.array([0, 2, 3, 5, 6], dtype=np.int64)
    ids = np.array([5, 1, 9, 2, 3, 0], dtype=np.int32)
    assert Examples(ids, ids, offsets).highest.tolist() == [5, 9, 3, 0]
    assert Examples(ids, ids, offsets, group=2).highest.tolist() == [9, 3]
    assert Examples(ids[:0], ids[:0], offsets[:1]).highest.tolist() == []


@pytest.mark.parametrize(
    ("positions", "length"), [(512, 256), (2047, 1024), (8191, 4096), (8192, 4096), (131072, 4096)]
)
def test_scored_length(positions: int, length: int) -> None:
    assert scored_length(SimpleNamespace(max_position_embeddings=positions)) == length


@pytest.mark.parametrize("group", [1, 2])
def test_take_keeps_examples_whole(make_examples: Callable[..., Examples], group: int) -> None:
    examples = make_examples([3, 5, 2, 7, 4, 6], group=group)
    taken = examples.take([2, 0])
    assert len(taken) == 2
    assert taken.lengths.tolist() == [examples.lengths[2], examples.lengths[0]]
    for place, source in ((0, 2), (1, 0)):
        for part in range(group):
            assert document(taken, place * group + part) == document(examples, source * group + part)
    assert taken.label_tokens < examples.label_tokens
    assert len(examples.take([])) == 0


def test_the_fingerprint_is_that_of_the_content(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([3, 5, 2])
    assert (
        examples.fingerprint()
        == make_examples([3, 5, 2]).fingerprint()
        == examples.take([0, 1, 2]).fingerprint()
    )
    others = [make_examples([3, 5, 2], seed=1), make_examples([3, 2, 5]), examples.take([1, 0, 2])]
    assert len({examples.fingerprint(), *(other.fingerprint() for other in others)}) == 4
