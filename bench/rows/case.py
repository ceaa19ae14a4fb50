"""A small data file with its right value, and what is made of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from msgspec import Struct

from shared.errors import DataError
from shared.messages.offers import DatasetType, FileFormat, TaskType
from trainer_node.engine.data.encode import IGNORED
from trainer_node.engine.data.examples import tokenize
from trainer_node.engine.data.formats.readers import DataFile
from trainer_node.engine.data.job_rows import read_job_rows
from trainer_node.engine.data.splits import format_of

LONGEST = 4096
END = 0x1F  # the end token's number, and a character that no case has


class Case(Struct, frozen=True, kw_only=True):
    """One file and what must come of it."""

    name: str  # of the file; its suffix is the format that the job names
    content: bytes
    right: tuple[tuple[str, str], ...] = ()  # of each document: what isn't scored, and what is
    settings: DatasetType = DatasetType(field_instruction="q", field_output="a")
    task_type: TaskType = TaskType.INSTRUCT
    dropped: dict[str, int] = {}
    notices: tuple[str, ...] = ()  # a part of each
    refusal: str = ""  # a part of the error


class Answer(Struct, frozen=True, kw_only=True):
    """What the readers and the encoder made of a file."""

    documents: tuple[tuple[str, str], ...] = ()
    dropped: dict[str, int] = {}
    notices: tuple[str, ...] = ()
    refusal: str = ""


class CharacterTokenizer:
    """One token for each character: what is trained can be read again."""

    bos_token_id = None
    eos_token_id = END
    chat_template = None

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        """Return the tokens of texts."""
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def answer_of(case: Case) -> Answer:
    """Read the case's file as a job would."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / case.name
        path.write_bytes(case.content)
        file = DataFile(path, format_of(case.name) or FileFormat.JSON, case.name)
        try:
            found = read_job_rows([file], case.task_type, case.settings)
            examples, unusable = tokenize(
                found.rows, case.task_type, case.settings, CharacterTokenizer(), LONGEST, source=case.name
            )
        except DataError as error:
            return Answer(refusal=str(error))
    documents = []
    for start, end in zip(examples.offsets[:-1], examples.offsets[1:], strict=True):
        ids, labels = examples.ids[start:end].tolist(), examples.labels[start:end].tolist()
        documents.append(
            (
                "".join(chr(token) for token, label in zip(ids, labels, strict=True) if label == IGNORED),
                "".join(chr(label) for label in labels if label != IGNORED),
            )
        )
    return Answer(documents=tuple(documents), dropped=found.dropped | unusable, notices=tuple(found.notices))


def fault_of(case: Case, answer: Answer) -> str:
    """Return what is wrong with an answer; nothing if it is right."""
    if case.refusal or answer.refusal:
        if case.refusal and case.refusal in answer.refusal and "\n" not in answer.refusal:
            return ""
        return f"refused: {answer.refusal or 'no'}"
    if answer.dropped != case.dropped:
        return f"dropped: {answer.dropped}"
    silent = [part for part in case.notices if not any(part in text for text in answer.notices)]
    if silent or len(answer.notices) != len(case.notices):
        return f"notices: {answer.notices}"
    end = "" if case.task_type is TaskType.CHAT else chr(END)  # which chatml doesn't have
    expected = tuple((prompt, scored + end) for prompt, scored in case.right)
    if answer.documents != expected:
        return f"documents: {str(answer.documents)[:200]}"
    return ""
