"""How far a model's next-token distributions are from the base model's, without ever holding all logits.

Shape letters: K compared places, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shared.planning.memory_fit import logit_rows

# Both models' logits and log-probabilities exist at a time, where the labels' log-probabilities need one.
COPIES = 4

Logits = Callable[[Tensor], Tensor]  # [K, H] -> [K, V]


def divergences(logits: Logits, vocabulary: int, hidden_KH: Tensor, base_KH: Tensor) -> Tensor:
    """KL(model || base) at each place, fp32[K]: the sum over v of p(v) (log p(v) - log base(v)).

    The head is the base model's in both: training changes layers of the decoder only. Few rows of logits
    exist at a time; backward computes them again.
    """
    parts, base_KH = [], base_KH.to(hidden_KH.dtype)
    rows = logit_rows(vocabulary, cpu=hidden_KH.device.type == "cpu") // COPIES

    def some(hidden: Tensor, base: Tensor) -> Tensor:
        logp = torch.log_softmax(logits(hidden).float(), 1)
        with torch.no_grad():
            base_logp = torch.log_softmax(logits(base).float(), 1)
        return (logp.exp() * (logp - base_logp)).sum(1)

    for hidden, base in zip(hidden_KH.split(rows), base_KH.split(rows), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(some, hidden, base, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(some(hidden, base))
    return torch.cat(parts)


def plain_logits(base: PreTrainedModel) -> Logits:
    """Return the product with a model's output matrix, for models whose logits are nothing else."""
    head_VH = base.get_output_embeddings().weight
    return lambda hidden_KH: torch.nn.functional.linear(hidden_KH, head_VH.to(hidden_KH.dtype))
