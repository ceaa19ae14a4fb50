"""Log-probabilities of label tokens, and distances from the base model's, without ever holding all logits.

Shape letters: N label tokens, K compared places, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shared.planning.memory_fit import logit_rows

# Both models' logits and log-probabilities exist at a time, where the labels' log-probabilities need one.
COPIES = 4

Logits = Callable[[Tensor], Tensor]  # [K, H] -> [K, V]


def label_logprobs(hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, chunk: int | None = None) -> Tensor:
    """log p(label) at each position, fp32[N], with exact gradients for hidden states and a learning head.

    Products run in the autocast dtype where autocast is on, else in the hidden states' own; the softmax in
    fp32. Replaces logits (N x V), their fp32 copy and their gradient by `chunk` rows of each: by default as
    many as the planner counts on.
    """
    device = hidden_NH.device.type
    chunk = chunk or logit_rows(len(head_VH), cpu=device == "cpu")
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
    with torch.autocast(device, enabled=False):
        return _LabelLogprobs.apply(hidden_NH.to(dtype), head_VH.to(dtype), labels_N, chunk)


class _LabelLogprobs(torch.autograd.Function):
    """The gradient of log p for the hidden state is head[label] - softmax @ head: made in the forward pass.

    There the logits exist already, so that a frozen head costs two products instead of three.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, chunk: int) -> Tensor:
        logp_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_NH.device)
        slope_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels_N), chunk):
            rows = slice(start, start + chunk)
            labels = labels_N[rows, None]
            logits = (hidden_NH[rows] @ head_VH.T).float()
            logits.sub_(logits.amax(1, keepdim=True))
            label_logits = logits.gather(1, labels)
            total = logits.exp_().sum(1, keepdim=True)
            logp_N[rows] = (label_logits - total.log()).squeeze(1)
            if slope_NH is not None:
                mean_head = (logits.to(head_VH.dtype) @ head_VH).float().div_(total)
                slope_NH[rows] = head_VH[labels_N[rows]] - mean_head
        ctx.chunk = chunk
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(slope_NH, hidden_NH, head_VH, labels_N)
        else:
            ctx.save_for_backward(slope_NH)
        return logp_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_N1 = gradients[0].unsqueeze(1)
        slope_NH = ctx.saved_tensors[0]
        grad_hidden = None if slope_NH is None else (slope_NH * grad_N1).to(slope_NH.dtype)
        if not ctx.needs_input_grad[1]:
            return grad_hidden, None, None, None
        _, hidden_NH, head_VH, labels_N = ctx.saved_tensors
        grad_VH = torch.zeros(head_VH.shape, dtype=torch.float32, device=head_VH.device)
        for start in range(0, len(labels_N), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            slope_NV = torch.softmax((hidden_NH[rows] @ head_VH.T).float(), 1).neg_()
            slope_NV.scatter_add_(1, labels_N[rows, None], torch.ones_like(slope_NV[:, :1]))
            # In the dtype of the other products: fp32 ones would take several times as long on a GPU.
            grad_VH += (slope_NV * grad_N1[rows]).to(hidden_NH.dtype).T @ hidden_NH[rows]
        return grad_hidden, grad_VH.to(head_VH.dtype), None, None


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
