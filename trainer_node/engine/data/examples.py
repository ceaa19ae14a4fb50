"""Training data: rows in, flat arrays of tokens and labels out.

An example is one document, or two for preference pairs (chosen, then rejected): `Examples.group` says
how many.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import DataError, EngineError
from shared.messages.offers import DatasetType, TaskType
from shared.messages.runs import ErrorCode, Scorer
from trainer_node.engine.data.columns import asked_columns, refuse_missing
from trainer_node.engine.data.conversations import advice, form_of
from trainer_node.engine.data.download import public_name
from trainer_node.engine.data.encode import IGNORED, Document, Encoder, Example, encoder
from trainer_node.engine.data.row_set import Row
from trainer_node.engine.data.sources import read_rows
from trainer_node.engine.data.token_ids import TokenizerError

__all__ = ["IGNORED", "Examples", "read_rows", "scored_length", "tokenize"]

CHUNK = 512  # rows tokenised in one call: enough for all cores, little enough to hold as Python lists
SCORED_LENGTH = 4096
UNKNOWN_POSITIONS = 8192  # what the scorer takes for a model that states none
SHORTEST = 2  # tokens; the scorer drops shorter rows
MOST_REASONS = 50  # a template's own words may be others for each row
OTHER_REASONS = "another reason"
TOKENIZER_FAILS = "the model's tokenizer fails on it"


@dataclass(frozen=True)
class BaseStates:
    """The base model's hidden states before its head, at the places where its distributions are compared.

    `states` [*, H], float32 or the bits of bfloat16, holds those of many documents, `starts` int64[D] where
    each document's begin; None: they are not known yet. `weight` is what one place's divergence counts for in
    the loss of its document.
    """

    states: NDArray[Any] | None
    starts: NDArray[np.int64]
    weight: float = 0.0


@dataclass(frozen=True)
class Examples:
    """N examples as flat arrays over their documents, D = N * group of them.

    `ids` and `labels` are int32 over all tokens (labels: -100 = not scored), `offsets` int64[D + 1] the
    documents' borders, `reference` float32[D] the reference model's log-probability of each document's labels
    (preferences only). `first_labelled` bool[D]: which documents had a label on their first token, where it
    can't be predicted (None: none had); `base` is there where the score has a divergence from the base model.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    group: int = 1
    reference: NDArray[np.float32] | None = None
    first_labelled: NDArray[np.bool_] | None = None
    base: BaseStates | None = None

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.group

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every example, int64[N]."""
        return np.diff(self.offsets[:: self.group])

    @property
    def highest(self) -> NDArray[np.int32]:
        """Return the highest token id of every example, int32[N]."""
        firsts = self.offsets[:-1][:: self.group]
        return np.maximum.reduceat(self.ids, firsts) if len(firsts) else self.ids[:0]

    @property
    def label_tokens(self) -> int:
        """Tokens that are scored."""
        return int(np.count_nonzero(self.labels != IGNORED))

    def take(self, indices: Any) -> Examples:
        """Return the examples at `indices`, in that order."""
        picked = np.asarray(indices, dtype=np.int64)
        documents = (picked[:, None] * self.group + np.arange(self.group)).ravel()
        starts, lengths = self.offsets[documents], np.diff(self.offsets)[documents]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Examples(
            self.ids[tokens],
            self.labels[tokens],
            offsets,
            self.group,
            None if self.reference is None else self.reference[documents],
            None if self.first_labelled is None else self.first_labelled[documents],
            None if self.base is None else replace(self.base, starts=self.base.starts[documents]),
        )

    def with_reference(self, reference: NDArray[np.float32]) -> Examples:
        """Return the same examples with the reference model's log-probabilities, float32[D]."""
        return replace(self, reference=reference)

    def with_base(self, base: BaseStates) -> Examples:
        """Return the same examples with the base model's states."""
        return replace(self, base=base)

    @property
    def compared(self) -> NDArray[np.bool_]:
        """Return the tokens after which the model's distribution is compared with the base model's, bool[T].

        The scorer's mask is that of the labels, not shifted: it has the place after the last label, and not
        the one that predicts the first.
        """
        mask: NDArray[np.bool_] = self.labels != IGNORED
        if self.first_labelled is not None:
            mask[self.offsets[:-1]] = self.first_labelled
        return mask

    def fingerprint(self) -> str:
        """Hex sha256 of the tokens, labels and borders: equal exactly for equal data."""
        digest = hashlib.sha256(f"{self.group}:{len(self.offsets)}:{len(self.ids)}:".encode())
        for array in (self.ids, self.labels, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def scored_length(config: Any) -> int:
    """Longest row that the scorer keeps: 4096 tokens, or half the model's positions if below 8192."""
    positions = getattr(config, "max_position_embeddings", None)
    return math.ceil(positions / 2) if positions and positions < 2 * SCORED_LENGTH else SCORED_LENGTH


def longest_row(config: Any, task_type: TaskType, scorer: Scorer) -> int:
    """Longest row of a kind of task: preference pairs of contests may fill all of the model's positions."""
    if task_type is TaskType.DPO and scorer is Scorer.CONTESTS:
        return getattr(config, "max_position_embeddings", None) or UNKNOWN_POSITIONS
    return scored_length(config)


def tokenize(
    rows: list[Row],
    task_type: TaskType,
    columns: DatasetType,
    tokenizer: Any,
    max_length: int,
    *,
    source: str = "the data",
    scorer: Scorer = Scorer.OFFERS,
    tick: Callable[[str], None] = lambda text: None,
) -> tuple[Examples, dict[str, int]]:
    """Token ids and labels as the scorer makes them, and how many rows were dropped for which reason.

    `max_length` is `longest_row` of the job; `tick` is called with the progress now and then. Raises
    DataError if no row has the named columns or none is left.
    """
    source = public_name(source)
    encode = encoder(task_type, columns, tokenizer, max_length, scorer)
    refuse_missing(asked_columns(task_type, columns), rows, rows[0] if rows else (), source)
    group = 2 if task_type is TaskType.DPO else 1
    parts: list[Examples] = []
    dropped: dict[str, int] = {}
    first: dict[str, int] = {}
    for start in range(0, len(rows), CHUNK):
        documents: list[Document] = []
        answers = _encoded(encode, rows[start : start + CHUNK], worked=any(map(len, parts)))
        for number, answer in enumerate(answers, start + 1):
            usable, reasons = _judge(answer, max_length)
            documents += usable
            for reason in reasons:
                known = reason if reason in dropped or len(dropped) < MOST_REASONS else OTHER_REASONS
                dropped[known] = dropped.get(known, 0) + 1
                first.setdefault(known, number)
        parts.append(_flat(documents, group))
        tick(f"{min(start + CHUNK, len(rows))} of {len(rows)} rows tokenised")
    examples = joined(parts, group)
    if not len(examples):
        reasons = [f"{reason} ({count}, first row {first[reason]})" for reason, count in dropped.items()]
        hint = advice(rows, form_of(columns)) if task_type is TaskType.CHAT else ""
        told = "; ".join(reasons) or "it is empty"
        raise DataError(f"{source}: no usable row among {len(rows)}: {told}{hint}")
    return examples, dropped


def _encoded(encode: Encoder, rows: list[Row], *, worked: bool) -> list[list[Example] | str]:
    """Return the answers for some rows, one by one where the tokenizer fails on one of them.

    Raises EngineError(UNSUPPORTED) if it fails on each of many, and hasn't `worked` on any before.
    """
    try:
        return encode(rows)
    except TokenizerError:
        answers = list[list[Example] | str]()
    for row in rows:
        try:
            answers += encode([row])
        except TokenizerError as error:
            answers.append(TOKENIZER_FAILS)
            failure = error
    if not worked and len(rows) > 1 and all(answer == TOKENIZER_FAILS for answer in answers):
        text = f"the model's tokenizer fails on each of {len(rows)} rows: {failure}"
        raise EngineError(ErrorCode.UNSUPPORTED, text) from failure
    return answers


def _judge(answer: list[Example] | str, max_length: int) -> tuple[list[Document], list[str]]:
    """Return the documents of one row that the scorer would score, and why others are dropped."""
    if isinstance(answer, str):
        return [], [answer]
    documents: list[Document] = []
    reasons: list[str] = []
    for example in answer:
        if reason := _unusable(example, max_length):
            reasons.append(reason)
        else:
            documents += example
    return documents, reasons


def _unusable(example: Example, max_length: int) -> str | None:
    for ids, labels in example:
        if len(ids) > max_length:
            return f"longer than {max_length} tokens"
        if len(ids) < SHORTEST:
            return f"shorter than {SHORTEST} tokens"
        if all(label == IGNORED for label in labels[1:]):
            return "nothing to score"
    return None


def _flat(documents: list[Document], group: int) -> Examples:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in documents])]).astype(np.int64)
    total = int(offsets[-1])
    ids = np.fromiter(chain.from_iterable(ids for ids, _ in documents), np.int32, total)
    labels = np.fromiter(chain.from_iterable(labels for _, labels in documents), np.int32, total)
    first_labelled = labels[offsets[:-1]] != IGNORED
    labels[offsets[:-1]] = IGNORED  # nothing comes before a document's first token to predict it from
    return Examples(
        ids, labels, offsets, group, first_labelled=first_labelled if any(first_labelled) else None
    )


def joined(parts: list[Examples], group: int) -> Examples:
    """Return the examples of all parts, one after the other."""
    starts = np.cumsum([0] + [len(part.ids) for part in parts])
    references = [part.reference for part in parts if part.reference is not None]
    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
    firsts = [
        np.zeros(len(part.offsets) - 1, dtype=bool) if part.first_labelled is None else part.first_labelled
        for part in parts
    ]
    return Examples(
        np.concatenate([part.ids for part in parts] or [np.empty(0, np.int32)]),
        np.concatenate([part.labels for part in parts] or [np.empty(0, np.int32)]),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
        group,
        np.concatenate(references) if references and len(references) == len(parts) else None,
        np.concatenate(firsts) if any(first.any() for first in firsts) else None,
        _joined_base(parts),
    )


def _joined_base(parts: list[Examples]) -> BaseStates | None:
    """Return all parts' base states, which must lie in one array; the divergence keeps its weight per place.

    That is the coefficient times rows over places, and both are other numbers in all parts together.
    """
    bases = [part.base for part in parts if part.base is not None]
    if not bases or len(bases) < len(parts):
        return None
    assert all(base.states is bases[0].states for base in bases)
    places = [int(part.compared.sum()) for part in parts]
    coefficient = bases[0].weight * places[0] / max(1, len(parts[0]))
    weight = coefficient * sum(map(len, parts)) / sum(places)
    return BaseStates(bases[0].states, np.concatenate([base.starts for base in bases]), weight)
