"""Direct preference optimisation with the sigmoid loss, as the scorer computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer_node.engine.data.packing import Batch

BETA = 0.1


def document_logprobs(logp_N: Tensor, batch: Batch) -> Tensor:
    """Log-probability of every document's labels, fp32[D], from that of every label token."""
    return logp_N.new_zeros(batch.documents).index_add(0, batch.label_documents_N, logp_N)


def loss(model: torch.nn.Module, batch: Batch, beta: float = BETA) -> Tensor:
    """Sum over pairs of -log sigmoid(beta * margin), the margin being the gain on the reference."""
    return pair_losses(document_logprobs(model(batch), batch), batch.reference_D, beta).sum()


def pair_losses(logp_D: Tensor, reference_D: Tensor | None, beta: float = BETA) -> Tensor:
    """Return the loss of every pair, fp32[D / 2]; documents alternate between chosen and rejected."""
    if reference_D is None:
        raise ValueError(
            "preference pairs need the reference model's log-probabilities: see score.reference_logprobs"
        )
    gain_P2 = (logp_D - reference_D).view(-1, 2)
    return -F.logsigmoid(beta * (gain_P2[:, 0] - gain_P2[:, 1]))
