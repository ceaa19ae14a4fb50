"""`podium train --preview`: the first rows as the model will see them, with what is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from shared.messages.offers import DatasetType, FileFormat, TaskType

if TYPE_CHECKING:
    from trainer_node.engine.data.examples import Examples

DOCUMENTS = ("chosen", "rejected")  # of a preference pair


class Span(Struct, frozen=True):
    """Neighbouring tokens that are all trained, or all not."""

    trained: bool
    text: str
    tokens: int


class PreviewRow(Struct, frozen=True):
    """One document: a row's text, or one side of a pair."""

    row: int
    side: str  # chosen, rejected, or empty
    spans: list[Span]


class Preview(Struct, frozen=True):
    """The first rows, and counts over all."""

    task_type: TaskType
    rows: int
    dropped: dict[str, int]
    tokens: int
    trained_tokens: int
    first: list[PreviewRow]


def preview(
    model: str, data: str, file_format: FileFormat, columns: DatasetType, task_type: TaskType, count: int
) -> Preview:
    """Read and tokenise the data as training does; raises EngineError. Imports the engine: seconds."""
    from trainer_node.engine.data.columns import asked_columns
    from trainer_node.engine.data.examples import read_rows, scored_length, tokenize
    from trainer_node.engine.model.loading import load_config, load_tokenizer

    found = read_rows(data, file_format, allow_private_urls=False, asked=asked_columns(task_type, columns))
    tokenizer = load_tokenizer(model)
    length = scored_length(load_config(model))
    examples, unusable = tokenize(found.rows, task_type, columns, tokenizer, length, source=data)
    return Preview(
        task_type=task_type,
        rows=len(examples),
        dropped=found.dropped | unusable,
        tokens=len(examples.ids),
        trained_tokens=examples.label_tokens,
        first=first_rows(examples, tokenizer, count),
    )


def first_rows(examples: Examples, tokenizer: Any, count: int) -> list[PreviewRow]:
    """Return the first `count` examples in spans."""
    made = []
    for document in range(min(count, len(examples)) * examples.group):
        start, end = examples.offsets[document], examples.offsets[document + 1]
        side = DOCUMENTS[document % 2] if examples.group == 2 else ""
        ids, labels = examples.ids[start:end].tolist(), examples.labels[start:end].tolist()
        made.append(PreviewRow(document // examples.group + 1, side, spans_of(ids, labels, tokenizer)))
    return made


def spans_of(ids: list[int], labels: list[int], tokenizer: Any) -> list[Span]:
    """Group a document's tokens by whether they are trained; a label of -100 is not."""
    spans: list[Span] = []
    start = 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or (labels[place] < 0) != (labels[start] < 0):
            text = tokenizer.decode(ids[start:place], skip_special_tokens=False)
            spans.append(Span(labels[start] >= 0, text, place - start))
            start = place
    return spans


def show(found: Preview, console: Console) -> None:
    """Print the rows: trained text is between marks, and bold on a terminal."""
    for row in found.first:
        tokens = sum(span.tokens for span in row.spans)
        trained = sum(span.tokens for span in row.spans if span.trained)
        head = f"row {row.row}{f', {row.side}' if row.side else ''}: {trained} of {tokens} tokens are trained"
        console.print(head, style="bold", highlight=False)
        text = Text()
        for span in row.spans:
            text.append(f"[[{span.text}]]" if span.trained else span.text, "green" if span.trained else "dim")
        console.print(text, soft_wrap=True)
        console.print()
    dropped = "".join(f"; {count} dropped: {reason}" for reason, count in found.dropped.items())
    console.print(
        f"{found.rows} rows of {found.task_type} with {found.tokens} tokens, {found.trained_tokens} of them "
        f"trained, which are marked [[ ]]{dropped}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
