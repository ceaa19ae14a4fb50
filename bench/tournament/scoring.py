"""Score an uploaded submission as upstream's evaluator loads it: stock transformers and PEFT, row by row."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from bench.tournament.tasks import CASES
from shared.messages.offers import FileFormat, TaskType
from shared.messages.runs import Scorer
from trainer_node.engine.data.examples import IGNORED, BaseStates, Examples, longest_row, read_rows, tokenize
from trainer_node.engine.evaluate import base_states, metric
from trainer_node.engine.model.adapters import load_adapter
from trainer_node.engine.model.exactness import label_model
from trainer_node.engine.model.loading import load_config, load_tokenizer

BETA = 0.1


class Score(Struct, frozen=True):
    """A submission's losses on the test rows, by stock code and by the engine's metric."""

    per_row: list[float]  # without a divergence: entries are compared row by row without it
    engine_loss: float
    base_loss: float
    divergence: float = 0.0  # weighted: what it adds to the mean over rows

    @property
    def loss(self) -> float:
        """Return what the task is scored by."""
        return float(np.mean(self.per_row)) + self.divergence


def score(base: Path, uploaded: Path, test: Path, case_name: str) -> Score:
    """Score a submission on the test rows; the tokenizer is the base model's."""
    case = CASES[case_name]
    rows = read_rows(str(test), FileFormat.JSON, allow_private_urls=False).rows
    length = longest_row(load_config(str(base)), case.task_type, Scorer.CONTESTS)
    tokenizer = load_tokenizer(str(base))
    examples, _ = tokenize(rows, case.task_type, case.dataset_type, tokenizer, length, scorer=Scorer.CONTESTS)
    original = _load(base)
    reference = None
    if case.task_type is TaskType.DPO:
        examples = examples.with_reference(metric.reference_logprobs(original, examples))
        reference = summed(original, examples)
    base_rows = losses(original, examples, reference)
    coefficient = float(case.environment.get("KL_COEF", 0.0))
    before = distributions(original, examples) if coefficient else []
    if coefficient:
        examples = with_states(original, examples, coefficient)
    if (uploaded / "adapter_config.json").is_file():
        model = load_adapter(original, str(uploaded))
    else:
        model = _load(uploaded)
    found = losses(model, examples, reference)
    added = coefficient * divergence(before, distributions(model, examples)) if coefficient else 0.0
    return Score(found.tolist(), metric.score(model, examples).loss, float(base_rows.mean()), added)


def distributions(model: Any, examples: Examples) -> list[torch.Tensor]:
    """Return each row's next-token log-probabilities, [K, V], at its labels: the mask isn't shifted."""
    model.eval()
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        for start, end in pairwise(examples.offsets.tolist()):
            ids = torch.from_numpy(examples.ids[start:end].astype(np.int64))[None]
            labels = examples.labels[start:end] != IGNORED
            if examples.first_labelled is not None:
                labels[0] = examples.first_labelled[len(found)]
            found.append(
                torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)[torch.from_numpy(labels)]
            )
    return found


def divergence(base: list[torch.Tensor], model: list[torch.Tensor]) -> float:
    """Return KL(model || base), the mean over all places of all rows."""
    pairs = zip(base, model, strict=True)
    sums = [float((new.exp() * (new - old)).sum().double()) for old, new in pairs]
    return sum(sums) / sum(len(places) for places in base)


def with_states(base: Any, examples: Examples, coefficient: float) -> Examples:
    """Return the rows as the engine's metric wants them where a divergence is scored."""
    counts = base_states.count_places(examples)
    starts = np.cumsum(counts) - counts
    states = np.zeros((int(counts.sum()), base.get_output_embeddings().weight.shape[1]), np.float32)
    base_states.fill(states, label_model(base), examples.with_base(BaseStates(None, starts)))
    weight = coefficient * len(examples) / len(states)
    return examples.with_base(BaseStates(states, starts, weight))


def losses(model: Any, examples: Examples, reference: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Return the loss of each row: mean cross-entropy of its labels, or DPO's sigmoid loss of a pair."""
    sums = summed(model, examples)
    if reference is None:
        counts = np.array([len(labels) for _, labels in _documents(examples)], dtype=np.float64)
        return -sums / counts
    gains = (sums - reference).reshape(-1, 2)
    return np.logaddexp(0.0, -BETA * (gains[:, 0] - gains[:, 1]))


def summed(model: Any, examples: Examples) -> NDArray[np.float64]:
    """Return the log-probability of each document's labels, one document at a time."""
    model.eval()
    found = []
    with torch.inference_mode():
        for ids, labels in _documents(examples):
            logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].float()
            logp = torch.log_softmax(logits, dim=-1)
            places = torch.from_numpy(labels - 1)
            targets = torch.from_numpy(ids[labels])
            found.append(float(logp[places, targets].double().sum()))
    return np.array(found)


def _documents(examples: Examples) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return each document's tokens, and the positions of its labels."""
    found = []
    for start, end in zip(examples.offsets[:-1], examples.offsets[1:], strict=True):
        ids = examples.ids[start:end].astype(np.int64)
        labels = np.flatnonzero(examples.labels[start:end] != IGNORED)
        found.append((ids, labels[labels > 0]))
    return found


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
