"""A row's conversation as turns of a role and a text, in the forms in which data sets hold them; pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from shared.messages.offers import DatasetType
from trainer_node.engine.data.columns import listed
from trainer_node.engine.data.row_set import Row, text_of, without_halves

ROLE_FIELDS = ("from", "role")  # the scorer's default, then that of OpenAI
CONTENT_FIELDS = ("value", "content")
BETWEEN_PARTS = "\n"

Turn = tuple[str, str]


class UnusableError(Exception):
    """One row can't be used; the text is the reason under which it is counted."""


class ConversationForm(Struct, frozen=True):
    """How the settings say that a conversation is stored."""

    column: str
    role_fields: tuple[str, ...]  # the first one that has a value in a message counts
    content_fields: tuple[str, ...]
    user: str
    assistant: str

    @property
    def roles(self) -> Mapping[str, str]:
        """Return the data's words for the roles that templates know."""
        return {self.user: "user", self.assistant: "assistant"}


def form_of(settings: DatasetType) -> ConversationForm:
    """Return the form, with the scorer's defaults."""
    return ConversationForm(
        column=settings.chat_column or "conversations",
        role_fields=(settings.chat_role_field,) if settings.chat_role_field else ROLE_FIELDS,
        content_fields=(settings.chat_content_field,) if settings.chat_content_field else CONTENT_FIELDS,
        user=settings.chat_user_reference or "user",
        assistant=settings.chat_assistant_reference or "assistant",
    )


def turns_of(row: Row, form: ConversationForm) -> list[Turn]:
    """Return the turns of a row, with a system turn of the column `system` if it has none of its own.

    Raises UnusableError if a message is no text or none is the assistant's.
    """
    roles = form.roles
    turns = []
    for message in messages_of(row, form):
        role = _first(message, form.role_fields)
        content = _content(_first(message, form.content_fields))
        if not isinstance(role, str) or content is None:
            fields = f"{form.role_fields[0]!r} or {form.content_fields[0]!r}"
            raise UnusableError(f"a message without text in {fields}")
        turns.append((roles.get(role, role), content))
    if not any(role == "assistant" for role, _ in turns):
        raise UnusableError(f"no message of the role {form.assistant!r}")
    system = row.get("system")
    return turns if turns[0][0] == "system" or not isinstance(system, str) else [("system", system), *turns]


def messages_of(row: Row, form: ConversationForm) -> list[dict[str, Any]]:
    """Return the messages of a row: a list of objects, the same as JSON text, or an object of lists.

    Raises UnusableError if the column holds something else.
    """
    messages = row.get(form.column)
    if messages is None:
        raise UnusableError(f"column {form.column!r} is missing")
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # in a field of CSV
        messages = _decoded(messages)
    if isinstance(messages, dict):  # a feature `Sequence` of `datasets` is stored as lists
        messages = _from_lists(messages)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UnusableError(f"column {form.column!r} is not a list of messages")
    if not messages:
        raise UnusableError(f"column {form.column!r} is empty")
    return messages


def roles_seen(rows: Iterable[Row], form: ConversationForm) -> tuple[list[str], list[str]]:
    """Return all roles and fields of the messages in some rows, those first that most have."""
    roles: Counter[str] = Counter()
    fields: Counter[str] = Counter()
    for row in rows:
        try:
            messages = messages_of(row, form)
        except UnusableError:
            continue
        for message in messages:
            fields.update(message.keys())
            if isinstance(role := _first(message, form.role_fields), str):
                roles[role] += 1
    return [role for role, _ in roles.most_common()], [field for field, _ in fields.most_common()]


def advice(rows: list[Row], form: ConversationForm) -> str:
    """Return what to set where no conversation could be used; nothing if the settings fit the messages."""
    roles, fields = roles_seen(rows, form)
    if not fields:
        return ""
    if not all(any(name in fields for name in names) for names in (form.role_fields, form.content_fields)):
        return f"; the messages have {listed(fields)}: name two in chat_role_field and chat_content_field"
    if form.assistant not in roles:
        return (
            f"; the roles are {listed(roles)}: name two in chat_user_reference and chat_assistant_reference"
        )
    return ""


def _first(message: dict[str, Any], fields: tuple[str, ...]) -> Any:
    return next((value for field in fields if (value := message.get(field)) is not None), None)


def _content(value: Any) -> str | None:
    """Return the text of a message: as it is, or its parts, one after the other."""
    if not isinstance(value, list):
        try:
            return text_of(value)
        except TypeError:
            return None
    texts = []
    for part in value:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise UnusableError("a message with a part that is not text")
        texts.append(text)
    return BETWEEN_PARTS.join(texts) if texts else None


def _decoded(text: str) -> Any:
    try:
        return without_halves(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _from_lists(columns: dict[str, Any]) -> Any:
    lists = {name: values for name, values in columns.items() if isinstance(values, list)}
    if not lists or len({len(values) for values in lists.values()}) != 1:
        return None
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
