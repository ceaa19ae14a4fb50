"""The settings of data sets that several benches and tests use."""

from __future__ import annotations

from shared.messages.offers import DatasetType

SHAREGPT = DatasetType(
    chat_template="chatml",
    chat_column="conversations",
    chat_role_field="from",
    chat_content_field="value",
    chat_user_reference="human",
    chat_assistant_reference="gpt",
)
