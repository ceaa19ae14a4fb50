"""Conversations as turns, and what is said of roles that fit no message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shared.messages import DatasetType, TaskType
from trainer_node.engine.data.conversations import advice, form_of, turns_of
from trainer_node.engine.data.examples import tokenize
from trainer_node.engine.data.job_rows import unmet
from trainer_node.engine.data.row_set import Row, RowSet
from trainer_node.engine.model.loading import load_tokenizer

SETTINGS = DatasetType(chat_user_reference="human", chat_assistant_reference="gpt")
FORM = form_of(SETTINGS)
OTHERS = tuple(f"guest {number}" for number in range(13))


def row(*roles: str) -> Row:
    return {"conversations": [{"from": role, "value": "Hello"} for role in roles]}


def notices(rows: list[Row]) -> list[str]:
    return list(unmet(TaskType.CHAT, SETTINGS, RowSet(rows=rows)))


def test_half_a_character_in_json_text_is_replaced(tiny_model: Path) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "cut \ud83d"}]
    rows: list[dict[str, Any]] = [{"conversations": json.dumps(talk)}]
    assert turns_of(rows[0], FORM) == [("user", "Hi"), ("assistant", "cut \ufffd")]
    examples, dropped = tokenize(rows, TaskType.CHAT, SETTINGS, load_tokenizer(str(tiny_model)), 256)
    assert (len(examples), dropped) == (1, {})


def test_a_field_without_a_value_gives_way_to_the_other_one() -> None:
    """Parquet files joined from both forms have all four fields in each message."""
    empty = dict.fromkeys(("from", "value"))
    talk = [{**empty, "role": role, "content": "Hello"} for role in ("human", "gpt")]
    assert turns_of({"conversations": talk}, FORM) == [("user", "Hello"), ("assistant", "Hello")]


def test_a_rare_role_is_not_said_to_be_missing() -> None:
    rows = [row(*OTHERS, "gpt")] * 2 + [row("human", "gpt")]
    assert notices(rows) == []
    assert advice([row("human"), *[row(*OTHERS)] * 2, row("gpt")], FORM) == ""
    assert notices([row("gpt")] * 1500 + [row("human", "gpt")]) == []


def test_a_role_that_is_missing_is_named_with_those_that_are_there() -> None:
    (notice,) = notices([row(*OTHERS, "gpt"), row("gpt")])
    assert notice.startswith("no message has the role 'human' (chat_user_reference); the roles are 'gpt', ")
    assert notice.endswith("and 2 more")
    assert "the roles are 'human': name two" in advice([row("human")], FORM)
