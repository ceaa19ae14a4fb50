"""Supervised fine-tuning: the loss is the scorer's own metric."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer_node.engine.data.packing import Batch
from trainer_node.engine.objectives import divergence


def loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Sum over the pack's examples of the mean negative log-likelihood of their label tokens.

    `model` answers a batch with fp32[N] log-probabilities (see model.LabelModel). Divided by the number of
    examples of the whole step, this is the mean over examples that the scorer computes; a mean over tokens
    would not be. Where the score has a divergence from the base model, that is added.
    """
    answer = model(batch)
    loss = -torch.dot(answer[: len(batch.weights_N)], batch.weights_N)
    added_D = divergence.weighted(answer, batch)
    return loss if added_D is None else loss + added_D.sum()
