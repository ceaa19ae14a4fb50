"""Ask a causal language model for the log-probabilities of a batch's label tokens.

Everything that is trained or scored goes through `LabelModel`; wrappers such as DDP go around it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.errors import EngineError
from shared.messages import ErrorCode
from trainer_node.engine.data.examples import IGNORED, Examples
from trainer_node.engine.data.packing import Batch, collate
from trainer_node.engine.model.attention import attention_kwargs, install
from trainer_node.engine.model.logprobs import label_logprobs

CHECK_TOKENS = 12
LOGIT_CHANGES = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling")
CHECK_TOLERANCE = 0.05  # relative, against the stock model; a forgotten logit factor costs far more


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

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model, with LoRA layers inside where the network is a PEFT model."""
        return self.network.get_base_model() if hasattr(self.network, "get_base_model") else self.network

    def forward(self, batch: Batch) -> Tensor:
        """Log-probability of every label token of the batch."""
        base = self.base
        # No weight is cast twice in a pass, and a cache would be shared between threads.
        with torch.autocast(batch.ids_T.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False):
            hidden_TH = base.get_decoder()(
                input_ids=batch.ids_T[None],
                position_ids=batch.positions_T[None],
                use_cache=False,
                **attention_kwargs(batch),
            ).last_hidden_state[0]
            hidden_NH = hidden_TH.index_select(0, batch.label_positions_N)
            return label_logprobs(hidden_NH, base.get_output_embeddings().weight, batch.labels_N)


def label_model(network: nn.Module, *, bf16: bool | None = None) -> LabelModel:
    """A network ready to be asked, with packed attention; a LabelModel is returned as it is.

    `bf16`: run matrix products in bf16 (default: if the weights are bf16). Raises EngineError(UNSUPPORTED) if
    the network doesn't compute logits as hidden @ head, which is tried on two short documents.
    """
    if isinstance(network, LabelModel):
        return network
    if bf16 is None:
        bf16 = next(network.parameters()).dtype == torch.bfloat16
    model = LabelModel(network, bf16)
    _check(model)
    return model


@torch.no_grad()
def _check(model: LabelModel) -> None:
    """Compare with the stock model on two short documents: changed logits and leaking documents show here."""
    base = model.base
    random = np.random.default_rng(0)
    ids = random.integers(0, base.config.vocab_size, CHECK_TOKENS, dtype=np.int32)
    labels = ids.copy()
    offsets = np.array([0, CHECK_TOKENS // 3, CHECK_TOKENS])
    labels[offsets[:-1]] = IGNORED
    device = base.get_input_embeddings().weight.device
    batch = collate(Examples(ids, labels, offsets), [0, 1], CHECK_TOKENS, device)
    training = model.training
    model.eval()
    base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")
    with torch.autocast(device.type, torch.bfloat16, enabled=model.bf16):
        logits = [
            base(ids[None], use_cache=False).logits[0] for ids in batch.ids_T.split(batch.document_lengths)
        ]
    logp_TV = torch.log_softmax(torch.cat(logits).float(), 1)
    wanted_N = logp_TV[batch.label_positions_N, batch.labels_N]
    install(base)
    error = float((model(batch) - wanted_N).abs().max())
    model.train(training)
    if not error <= CHECK_TOLERANCE * (1 + float(wanted_N.abs().max())):
        changes = [name for name in LOGIT_CHANGES if getattr(base.config, name, None)]
        raise EngineError(
            ErrorCode.UNSUPPORTED,
            f"{type(base).__name__} can't be trained: packed, its log-probabilities are off by {error:.3g}"
            + (f" because of {', '.join(changes)}" if changes else ""),
        )
