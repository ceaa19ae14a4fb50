"""Which columns of the data a job asks for, and what is said if they aren't there; pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from shared.errors import DataError
from shared.messages.offers import DatasetType, TaskType
from trainer_node.engine.data.row_set import AskedColumns, Row

MOST_NAMED = 12  # columns, roles or fields that a text lists
CONVERSATIONS = ("messages", "conversations", "conversation")


def asked_columns(task_type: TaskType, settings: DatasetType) -> AskedColumns:
    """Return the columns that the settings name, or the scorer's defaults where it has some.

    Raises DataError if one that must be named isn't.
    """
    if task_type is TaskType.CHAT:
        # A column called `system` opens a conversation that has no system turn of its own.
        return AskedColumns((settings.chat_column or "conversations",), ("system",))
    if task_type is TaskType.DPO:
        fields = ("field_prompt", "field_chosen", "field_rejected")
        return AskedColumns(tuple(_named(getattr(settings, field), field) for field in fields))
    if not settings.field_output:
        return AskedColumns((_named(settings.field_instruction or settings.field, "field_instruction"),))
    needed = (_named(settings.field_instruction, "field_instruction"), settings.field_output)
    # An unnamed system or input column goes by its default name in the scorer: a column called so counts.
    return AskedColumns(needed, (settings.field_system or "system", settings.field_input or "input"))


def _named(column: str | None, field: str) -> str:
    if not column:
        raise DataError(f"the dataset type names no column: {field} is missing")
    return column


def refuse_missing(asked: AskedColumns, rows: Sequence[Row], present: Iterable[str], name: str) -> None:
    """Raise DataError if no row has a column that is needed; it names those that there are."""
    for column in asked.needed:
        if not any(column in row for row in rows):
            raise DataError(
                f"{name}: no row has the column {column!r}; {present_columns(column, list(present))}"
            )


def listed(names: Sequence[str]) -> str:
    """Return names in quotes: the first of them, and how many more there are."""
    text = ", ".join(map(repr, names[:MOST_NAMED]))
    return f"{text} and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else text


def present_columns(missing: str, present: Sequence[str]) -> str:
    """Return the columns that there are instead of the missing one, and which may be meant."""
    text = f"the columns of row 1 are {listed(present) or 'none'}"
    near = difflib.get_close_matches(missing, present, n=1) or [
        path for path in present if path.endswith(f".{missing}") or path.lower() == missing.lower()
    ]
    if near:
        text += f"; is {near[0]!r} meant?"
    elif missing in CONVERSATIONS and (others := [name for name in CONVERSATIONS if name in present]):
        other = others[0]
        text += (
            f"; for conversations in {other!r} set chat_column to {other!r}, and chat_role_field and "
            "chat_content_field to the names in their messages, such as 'role' and 'content'"
        )
    return text
