"""The loss of every test row, as tournaments score a task of its kind against its base model.

Next to the engine's own metric this computes the divergence from both models' whole logits: the engine keeps
the base model's hidden states and takes its head to be the tuned model's, which a submission needn't respect.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate import metric


def losses_of(
    model: torch.nn.Module, base: torch.nn.Module, examples: Examples, kl_coefficient: float
) -> NDArray[np.float64]:
    """Return the loss of every row, float64[N]; its mean is the score. Preference pairs need `with_base`."""
    losses = metric.score(model, examples).per_example
    if not kl_coefficient:
        return losses
    # The scorer's divergence is the mean over all places of the set, not over rows.
    weight = kl_coefficient * len(examples) / int(examples.compared.sum())
    return losses + weight * divergences(model, base, examples)


def with_base(base: torch.nn.Module, examples: Examples) -> Examples:
    """Return preference pairs with what the base model gives them; other examples as they are."""
    if examples.group == 1:
        return examples
    return examples.with_reference(metric.reference_logprobs(base, examples))


def divergences(model: torch.nn.Module, base: torch.nn.Module, examples: Examples) -> NDArray[np.float64]:
    """Return KL(model || base), summed over each row's compared places, float64[N]."""
    found, compared = np.zeros(len(examples)), examples.compared
    device = next(model.parameters()).device
    for number, (start, end) in enumerate(pairwise(examples.offsets.tolist())):
        ids_1T = torch.from_numpy(examples.ids[None, start:end].astype(np.int64)).to(device)
        places_K = torch.from_numpy(np.flatnonzero(compared[start:end])).to(device)
        with torch.inference_mode():
            mine_KV, others_KV = (_predicted(one, ids_1T, places_K) for one in (model, base))
            found[number] = float((mine_KV.exp() * (mine_KV - others_KV)).sum())
    return found


def _predicted(model: torch.nn.Module, ids_1T: torch.Tensor, places_K: torch.Tensor) -> torch.Tensor:
    """Return the model's log-probabilities of all tokens after these places, fp32[K, V]."""
    logits_TV: torch.Tensor = model.eval()(input_ids=ids_1T).logits[0]
    return logits_TV[places_K].float().log_softmax(-1)
