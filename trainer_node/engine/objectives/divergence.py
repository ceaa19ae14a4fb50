"""The part of a score that grows with the distance from the base model."""

from __future__ import annotations

from torch import Tensor

from trainer_node.engine.data.packing import Batch


def weighted(answer: Tensor, batch: Batch) -> Tensor | None:
    """Return what each document's divergence adds to its loss, fp32[D]; None where the score has none.

    `answer` is the model's to the batch: label log-probabilities, then the divergence at each compared place.
    """
    places = batch.compared
    if places is None or places.states_KH is None:
        return None
    found_K = answer[batch.label_tokens :]
    return answer.new_zeros(batch.documents).index_add(0, places.documents_K, places.weight * found_K)
