"""Log-probabilities through a model's own code for logits, for heads that are more than one product.

Soft caps, scales, biases, norms before the head: a causal model's own `forward` does all of it after its
decoder. It is run with a decoder that only hands over hidden states. Shape letters: N label tokens, H hidden
size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shared.planning.memory_fit import logit_rows


def own_logprobs(base: PreTrainedModel, hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    """log p(label) at each position, fp32[N]; few rows of logits exist at a time, also backward."""
    head, parts = _without_decoder(base), []
    rows = logit_rows(base.get_output_embeddings().weight.shape[0], cpu=hidden_NH.device.type == "cpu")

    def some(hidden: Tensor, labels: Tensor) -> Tensor:
        logp = torch.log_softmax(_logits(head, hidden).float(), 1)
        return logp.gather(1, labels[:, None]).squeeze(1)

    for hidden, labels in zip(hidden_NH.split(rows), labels_N.split(rows), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(some, hidden, labels, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(some(hidden, labels))
    return torch.cat(parts)


def own_logits(base: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return what computes logits [N, V] from hidden states [N, H] as the model's own code does."""
    head = _without_decoder(base)
    return lambda hidden_NH: _logits(head, hidden_NH)


def has_plain_head(base: PreTrainedModel, hidden_NH: Tensor) -> bool:
    """Return whether a model's logits are just the product of hidden states and its output matrix."""
    matrix = base.get_output_embeddings().weight
    own = _logits(_without_decoder(base), hidden_NH)
    plain = torch.nn.functional.linear(hidden_NH, matrix)
    # The same product in the same dtype: what differs is rounding at most, and a bias far more.
    return bool(torch.allclose(own.float(), plain.float(), rtol=1e-3, atol=1e-3 * float(plain.abs().max())))


def _logits(head: Any, hidden_NH: Tensor) -> Tensor:
    head._modules[head.base_model_prefix].hidden_states = hidden_NH[None]
    logits: Tensor = head(inputs_embeds=hidden_NH[None], use_cache=False).logits[0]
    return logits


def _without_decoder(base: PreTrainedModel) -> Any:
    """Return the model with the same weights and without its decoder; a thread can have its own."""
    head = copy.copy(base)
    replaced = _HandOver(base.base_model, base.get_decoder())
    head._modules = {**base._modules, base.base_model_prefix: replaced}
    return head


class _HandOver(nn.Module):
    """Replace a decoder, or a module around it, by one that returns given hidden states."""

    hidden_states: Tensor

    def __init__(self, stands_for: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(stands_for=stands_for, decoder_itself=decoder)  # not as parts of its own

    def forward(self, *_: Any, **__: Any) -> _Answer:
        """Return the given hidden states, whatever the input."""
        return _Answer(self.hidden_states)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["stands_for"], name)  # such as a multiplier
        return self if value is self.__dict__["decoder_itself"] else value


class _Answer:
    """A decoder's output of which only the hidden states are known."""

    def __init__(self, hidden_states: Tensor) -> None:
        self.last_hidden_state = hidden_states

    def __getitem__(self, index: int) -> Tensor:
        if index != 0:
            raise IndexError(index)
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
