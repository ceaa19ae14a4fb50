"""Ask a causal language model for the log-probabilities of a batch's label tokens.

Everything that is trained or scored goes through `LabelModel`; wrappers such as DDP go around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.planning.architectures import Batching
from trainer_node.engine.data.packing import Batch
from trainer_node.engine.model.hidden_states import packed_states, padded_states
from trainer_node.engine.model.logprobs import divergences, label_logprobs, plain_logits
from trainer_node.engine.model.own_head import own_logits, own_logprobs
from trainer_node.engine.model.rotary import go_by_row

T = TypeVar("T")


class LabelModel(nn.Module):
    """A causal language model that answers a Batch with each label token's log-probability, fp32[N].

    Takes the decoder's hidden states and applies the output matrix at label positions only: at 30% labels and
    a vocabulary of 49k this halves the cost of the head, and no tensor of T x V ever exists.
    """

    def __init__(self, network: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self.bf16 = bf16
        self.batching = Batching.PACKED
        self.recordable = True  # as a CUDA graph, until that fails
        self.plain_head = True  # logits are hidden states times the output matrix, and nothing else
        # Tokens: longer rows have rotary frequencies of their own. None: no row has.
        self.rotary_limit = go_by_row(self.base)

    @property
    def base(self) -> PreTrainedModel:
        """Return the Hugging Face model, with LoRA layers inside where the network is a PEFT model."""
        return self.network.get_base_model() if hasattr(self.network, "get_base_model") else self.network

    def answer(self, question: Callable[[], T]) -> T:
        """Return what a question about the model's parts gives, which are whole in it if they are sharded."""
        return question()

    def forward(self, batch: Batch, *, compared_states: bool = False) -> Tensor:
        """Log-probability of every label token of the batch, fp32[N].

        Where the batch has K compared places, [N + K]: then the divergence from the base model at each. With
        `compared_states`, the hidden states at those places instead, [K, H].
        """
        base, places = self.base, batch.compared
        positions_M, documents_M = batch.label_positions_N, batch.label_documents_N
        if places is not None:
            positions_M = torch.cat([positions_M, places.positions_K])
            documents_M = torch.cat([documents_M, places.documents_K])
        # No weight is cast twice in a pass, and a cache would be shared between threads.
        with torch.autocast(batch.ids_T.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            states = packed_states if self.batching is Batching.PACKED else padded_states
            hidden_MH = states(base.get_decoder(), batch, positions_M, documents_M, self.rotary_limit)
            labels = len(batch.labels_N)
            if compared_states:
                return hidden_MH[labels:]
            logp_N = self._label_logprobs(hidden_MH[:labels], batch.labels_N)
            if places is None or places.states_KH is None:
                return logp_N
            head = plain_logits(base) if self.plain_head else own_logits(base)
            vocabulary = len(base.get_output_embeddings().weight)
            found_K = divergences(head, vocabulary, hidden_MH[labels:], places.states_KH)
            return torch.cat([logp_N, found_K])

    def _label_logprobs(self, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
        if not self.plain_head:
            return own_logprobs(self.base, hidden_NH, labels_N)
        return label_logprobs(hidden_NH, self.base.get_output_embeddings().weight, labels_N)
