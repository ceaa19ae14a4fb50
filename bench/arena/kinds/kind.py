"""The kinds of the arena's tasks, and how the engine and the scorer read their rows."""

from __future__ import annotations

from typing import Literal, get_args

from msgspec import Struct

from shared.messages.offers import DatasetType, TaskType
from shared.messages.runs import Scorer

# kl: instruct, and the score has a divergence from the base model.
Kind = Literal["instruct", "kl", "chat", "dpo"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Form(Struct, frozen=True):
    """How the rows of one kind are read. All kinds but instruct are encoded as contests do it."""

    task_type: TaskType
    columns: DatasetType
    scorer: Scorer


PROMPTS = DatasetType(field_instruction="prompt", field_output="completion")
CHATS = DatasetType(
    chat_template="chatml",
    chat_column="messages",
    chat_role_field="role",
    chat_content_field="content",
    chat_user_reference="user",
    chat_assistant_reference="assistant",
)
PREFERENCES = DatasetType(field_prompt="prompt", field_chosen="chosen", field_rejected="rejected")
FORMS: dict[Kind, Form] = {
    "instruct": Form(TaskType.INSTRUCT, PROMPTS, Scorer.OFFERS),
    "kl": Form(TaskType.INSTRUCT, PROMPTS, Scorer.CONTESTS),
    "chat": Form(TaskType.CHAT, CHATS, Scorer.CONTESTS),
    "dpo": Form(TaskType.DPO, PREFERENCES, Scorer.CONTESTS),
}
