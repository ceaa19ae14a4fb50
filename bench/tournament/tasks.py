"""The tasks of the bench: each kind that a text tournament has, on a tiny model or on SmolLM2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from bench.arena.task import SMOLLM2
from bench.harness.dataset_types import SHAREGPT
from bench.harness.tiny_jobs import MODEL as TINY
from shared.messages.offers import DatasetType, TaskType

MODELS: Final = {"tiny": TINY, "smollm2": SMOLLM2}
TEST_ROWS: Final = 60
INSTRUCT: Final = DatasetType(field_instruction="instruct", field_output="output", system_prompt="")
PAIRS: Final = DatasetType(field_prompt="prompt", field_chosen="chosen", field_rejected="rejected")

Row = dict[str, Any]


class ContestCase(Struct, frozen=True, kw_only=True):
    """One kind of task: what upstream says of it, and how its rows are made."""

    task_type: TaskType
    dataset_type: DatasetType
    row: Callable[[int], Row]
    environment: dict[str, str] = {}


def question(number: int) -> str:
    """Return a question that a tiny model can learn to answer."""
    return f"What comes after {number % 37}?" + " Think." * (number % 5)


def answer(number: int) -> str:
    """Return its answer."""
    return f"It is {number % 37 + 1}, of course."


def _instruct(number: int) -> Row:
    return {"instruct": question(number), "output": answer(number)}


def _text(number: int) -> Row:
    return {"text": f"{question(number)} {answer(number)}"}


def _talk(number: int) -> Row:
    turns = [
        ("human", question(number)),
        ("gpt", answer(number)),
        ("human", "Again."),
        ("gpt", answer(number)),
    ]
    return {"conversations": [{"from": who, "value": what} for who, what in turns]}


def _pair(number: int) -> Row:
    return {"prompt": question(number), "chosen": answer(number), "rejected": f"It is {number % 11}."}


CASES: Final = {
    "instruct": ContestCase(task_type=TaskType.INSTRUCT, dataset_type=INSTRUCT, row=_instruct),
    "instruct_kl": ContestCase(
        task_type=TaskType.INSTRUCT,
        dataset_type=INSTRUCT,
        row=_instruct,
        environment={"USE_KL": "1", "KL_COEF": "0.3"},
    ),
    "completion": ContestCase(
        task_type=TaskType.INSTRUCT, dataset_type=DatasetType(field_instruction="text"), row=_text
    ),
    "chat": ContestCase(task_type=TaskType.CHAT, dataset_type=SHAREGPT, row=_talk),
    "chat_own": ContestCase(  # the model's own template, if it has one
        task_type=TaskType.CHAT,
        dataset_type=replace(SHAREGPT, chat_template="tokenizer_default_fallback_chatml"),
        row=_talk,
    ),
    "dpo": ContestCase(task_type=TaskType.DPO, dataset_type=PAIRS, row=_pair),
}


def rows_of(case: ContestCase, count: int) -> tuple[list[Row], list[Row]]:
    """Return training rows, and test rows that none of them equals."""
    test = [case.row(number * 7 + 3) for number in range(TEST_ROWS)]
    seen = {str(row) for row in test}
    train = [row for number in range(4 * count) if str(row := case.row(number)) not in seen]
    return train[:count], test
