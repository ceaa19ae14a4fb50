"""The rows that a job trains on, and what people should know of how its settings fit them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shared.messages.offers import DatasetType, TaskType
from trainer_node.engine.data.columns import asked_columns, listed, present_columns
from trainer_node.engine.data.conversations import form_of, roles_seen
from trainer_node.engine.data.formats.readers import DataFile, read
from trainer_node.engine.data.row_set import RowSet

FIRST = 1000  # rows in which the user's role nearly always is: without it, all are searched


def read_job_rows(files: Sequence[DataFile], task_type: TaskType, settings: DatasetType) -> RowSet:
    """Return the rows of the files with the columns that the settings name. Raises DataError."""
    found = read(files, asked_columns(task_type, settings))
    for text in unmet(task_type, settings, found):
        found.notice(text)
    return found


def unmet(task_type: TaskType, settings: DatasetType, found: RowSet) -> Iterator[str]:
    """Yield what the settings name and the rows lack, or the reverse: a misspelt name shows here."""
    if task_type is TaskType.INSTRUCT:
        yield from _unmet_columns(settings, found)
    elif task_type is TaskType.CHAT:
        form = form_of(settings)
        roles, _ = roles_seen(found.rows[:FIRST], form)
        if form.user not in roles:
            roles, _ = roles_seen(found.rows, form)
        if form.user not in roles and form.assistant in roles:
            seen = listed(roles)
            yield f"no message has the role {form.user!r} (chat_user_reference); the roles are {seen}"


def _unmet_columns(settings: DatasetType, found: RowSet) -> Iterator[str]:
    for field in ("field_system", "field_input"):
        column = getattr(settings, field)
        if settings.field_output and column and not any(column in row for row in found.rows):
            there = present_columns(column, found.columns)
            yield f"no row has the column {column!r} ({field}), so it is left out; {there}"
    column = settings.field_instruction or settings.field
    others = listed([name for name in found.columns if name != column])
    if not settings.field_output and others:
        yield f"no field_output is named: the text of {column!r} is trained as it is, without {others}"
