"""The scorer's metric: what the upstream evaluator would print for a model and some examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.clock import Clock
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import Batch, collate
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from trainer_node.engine.model.compile import eager
from trainer_node.engine.model.exactness import label_model
from trainer_node.engine.model.label_model import LabelModel
from trainer_node.engine.objectives import divergence, dpo

BATCH_TOKENS = 4096
FIRST_PIECE, MOST_PIECE = 4, 128  # rows scored between two looks at the clock
PIECE_S = 5.0  # that they should take


@dataclass(frozen=True)
class Evaluation:
    """The metric on some examples: `loss` is the mean of `per_example`, float64[N]; lower is better."""

    loss: float
    per_example: NDArray[np.float64]


def score(
    model: torch.nn.Module,
    examples: Examples,
    *,
    batch_tokens: int = BATCH_TOKENS,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Evaluation:
    """Return the metric for the examples' kind: preference pairs, or anything else.

    Every process of the group must call it. Each scores its share of the batches, all get the whole result.
    """
    kind = score_dpo if examples.group == 2 else score_sft
    return kind(model, examples, batch_tokens=batch_tokens, process_group=process_group)


def measure(
    model: torch.nn.Module,
    dev: Examples,
    clock: Clock,
    until: float,
    process_group: ProcessGroup = SINGLE_PROCESS,
    scored: Callable[..., Evaluation] | None = None,
    alive: Callable[[], None] = lambda: None,
) -> tuple[Evaluation, float]:
    """Score the first development rows, as many as there is time for `until` then; and the seconds per row.

    A piece takes PIECE_S, by the speed of the one before. The first is the slowest, as kernels and memory are
    used for the first time: it doesn't count for the speed if there are more.
    """
    scored, parts = scored or score, list[Evaluation]()
    rows, times = [0], [clock.time()]
    while rows[-1] < len(dev) and (not parts or times[-1] < until):
        if len(rows) == 1:
            count = FIRST_PIECE * process_group.world
        else:
            row_s = (times[-1] - times[-2]) / (rows[-1] - rows[-2])
            count = next_piece(rows[-1] - rows[-2], row_s, until - times[-1], process_group.world)
        piece = dev.take(np.arange(rows[-1], min(rows[-1] + count, len(dev))))
        parts.append(scored(model, piece, process_group=process_group))
        rows.append(rows[-1] + len(parts[-1].per_example))
        times.append(clock.time())
        alive()
    losses = np.concatenate([part.per_example for part in parts])
    skip = 1 if len(parts) > 1 else 0
    return Evaluation(float(losses.mean()), losses), (times[-1] - times[skip]) / (rows[-1] - rows[skip])


def next_piece(last: int, row_s: float, left_s: float, world: int) -> int:
    """Return how many rows to score after `last` rows that took `row_s` each; the same for every process.

    At most twice as many, and no more than PIECE_S or the time that is left allow. Where rows take no time,
    as on the token clock, the answer is the same on any machine.
    """
    most = min(2 * last, MOST_PIECE * world)
    if row_s > 0:
        most = min(most, int(min(PIECE_S, left_s) / row_s))
    return max(1, most // world) * world


def score_sft(
    model: torch.nn.Module,
    examples: Examples,
    *,
    batch_tokens: int = BATCH_TOKENS,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Evaluation:
    """Mean over examples of the mean negative log-likelihood of their label tokens.

    Examples with the base model's states add the weighted divergence from it, each at its own places: over
    all rows that is the mean over all places.
    Examples come several to a batch; the result is that of one by one. `model` may be a plain Hugging Face or
    PEFT model; it keeps its mode.
    """

    def losses(answer: Tensor, batch: Batch) -> Tensor:
        losses_D = -dpo.document_logprobs(answer[: batch.label_tokens] * batch.weights_N, batch)
        added_D = divergence.weighted(answer, batch)
        return losses_D if added_D is None else losses_D + added_D

    return _score(model, examples, batch_tokens, process_group, losses)


def score_dpo(
    model: torch.nn.Module,
    examples: Examples,
    *,
    batch_tokens: int = BATCH_TOKENS,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Evaluation:
    """Mean over pairs of the sigmoid loss; the examples carry the reference model's log-probabilities."""

    def losses(logp_N: Tensor, batch: Batch) -> Tensor:
        return dpo.pair_losses(dpo.document_logprobs(logp_N, batch), batch.reference_D)

    return _score(model, examples, batch_tokens, process_group, losses)


def reference_logprobs(
    model: torch.nn.Module,
    examples: Examples,
    *,
    batch_tokens: int = BATCH_TOKENS,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> NDArray[np.float32]:
    """Log-probability of every document, float32[N * group], under a model that must still be the base model.

    Before the first step LoRA factors and dense weights change nothing, so the model to be trained will do.
    """
    result = np.zeros((len(examples), examples.group), dtype=np.float32)
    for indices, batch, logp_N in _batches(label_model(model), examples, batch_tokens, process_group):
        result[indices] = dpo.document_logprobs(logp_N, batch).view(-1, examples.group).float().cpu().numpy()
    return process_group.merged(result).ravel()


def compared_states(
    model: LabelModel,
    examples: Examples,
    *,
    batch_tokens: int = BATCH_TOKENS,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Yield hidden states [K, H] at places where distributions are compared, with the rows they belong in.

    The examples' `base.starts` say where each document's rows begin. Each process gets its share of them.
    """
    assert examples.base is not None
    for indices, batch, states_KH in _batches(model, examples, batch_tokens, process_group, states=True):
        assert batch.compared is not None
        owners = batch.compared.documents_K.cpu().numpy()
        counts = np.bincount(owners, minlength=len(indices))
        starts = examples.base.starts[indices] - np.cumsum(counts) + counts
        yield np.arange(len(owners)) + starts[owners], states_KH


def _score(
    model: torch.nn.Module,
    examples: Examples,
    batch_tokens: int,
    process_group: ProcessGroup,
    losses: Callable[[Tensor, Batch], Tensor],
) -> Evaluation:
    per_example = np.zeros(len(examples), dtype=np.float64)
    for indices, batch, logp_N in _batches(label_model(model), examples, batch_tokens, process_group):
        per_example[indices] = losses(logp_N, batch).double().cpu().numpy()
    per_example = process_group.merged(per_example)
    return Evaluation(float(per_example.mean()), per_example)


def _batches(
    model: LabelModel,
    examples: Examples,
    batch_tokens: int,
    process_group: ProcessGroup,
    *,
    states: bool = False,
) -> Iterator[tuple[list[int], Batch, Tensor]]:
    """Yield the model's answer for this process's examples, in batches of neighbours in length.

    The batches are the same, and so is every bit of a result, on any number of processes.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        # Sharded weights that are gathered in inference mode could never be trained afterwards.
        with torch.inference_mode() if process_group.is_single else torch.no_grad(), eager():
            groups = list(_groups(examples.lengths.tolist(), batch_tokens))
            for _, indices, counts in process_group.share(groups):
                batch = collate(examples, indices, int(examples.lengths[indices].sum()), device)
                answer = model(batch, compared_states=states)
                if counts:
                    yield indices, batch, answer
    finally:
        model.train(training)


def _groups(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield all indices, shortest first, in groups of at most `batch_tokens` tokens (or one example)."""
    group: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and tokens + lengths[index] > batch_tokens:
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += lengths[index]
    if group:
        yield group
