"""The kinds of the arena's tasks, and how the engine and the scorer read their rows."""

from __future__ import annotations

from typing import Literal, get_args

from msgspec import Struct

from shared.messages.offers import DatasetType, TaskType
from shared.messages.runs import Scorer

Kind = Literal["instruct", "kl"]  # kl: instruct, and the score has a divergence from the base model
KINDS: tuple[Kind, ...] = get_args(Kind)


class Form(Struct, frozen=True):
    """What a job of one kind says of its rows; only tournaments have more than instruct."""

    task_type: TaskType
    columns: DatasetType
    scorer: Scorer


PROMPTS = DatasetType(field_instruction="prompt", field_output="completion")
FORMS: dict[Kind, Form] = {
    "instruct": Form(TaskType.INSTRUCT, PROMPTS, Scorer.OFFERS),
    "kl": Form(TaskType.INSTRUCT, PROMPTS, Scorer.CONTESTS),
}
