"""Supervised fine-tuning: the loss is the scorer's own metric."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer_node.engine.data.packing import Batch


def loss(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Sum over the pack's examples of the mean negative log-likelihood of their label tokens.

    `model` answers a batch with fp32[N] log-probabilities (see model.LabelModel). Divided by the number of
    examples of the whole step, this is the mean over examples that the scorer computes; a mean over tokens
    would not be.
    """
    return -torch.dot(model(batch), batch.weights_N)
