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
        return _LabelLogprobs.apply(hidden_NH.to(dtype), head_VH, labels_N, chunk)


class _LabelLogprobs(torch.autograd.Function):
    """The gradient of log p for the hidden state is head[label] - softmax @ head: made in the forward pass.

    There the logits exist already, so that a frozen head costs two products instead of three, and one that
    learns three instead of four, if there is one chunk. The head is cast in here, so that autograd makes no
    copies. Each chunk's gradient is of the products' dtype, and their sum fp32. For one backward pass only.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor, chunk: int) -> Tensor:
        ctx.chunk, ctx.head_dtype = chunk, head_VH.dtype
        head_VH = head_VH.to(hidden_NH.dtype)
        logp_N = torch.empty(len(labels_N), dtype=torch.float32, device=hidden_NH.device)
        slope_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        kept: tuple[Tensor | None, ...] = ()
        for start in range(0, len(labels_N), chunk):
            rows = slice(start, start + chunk)
            exps_NV, total_N1, logp_N[rows] = _softmax_parts(hidden_NH[rows], head_VH, labels_N[rows])
            if slope_NH is not None:
                mean_head = (exps_NV.to(head_VH.dtype) @ head_VH).float().div_(total_N1)
                slope_NH[rows] = head_VH[labels_N[rows]] - mean_head
            if ctx.needs_input_grad[1] and len(labels_N) <= chunk:
                kept = (exps_NV, total_N1)
            del exps_NV  # before the next chunk's logits
        if ctx.needs_input_grad[1]:
            kept = kept or (head_VH,)
            ctx.save_for_backward(slope_NH, hidden_NH, labels_N, *kept)
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
        _, hidden_NH, labels_N, *kept = ctx.saved_tensors
        if len(kept) == 2:
            grad_VH = _head_gradient(hidden_NH, labels_N, grad_N1, *kept)
            return grad_hidden, grad_VH.to(ctx.head_dtype), None, None
        sums_VH = torch.zeros(kept[0].shape, dtype=torch.float32, device=hidden_NH.device)
        for start in range(0, len(labels_N), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            exps_NV, total_N1, _ = _softmax_parts(hidden_NH[rows], kept[0], labels_N[rows])
            sums_VH += _head_gradient(hidden_NH[rows], labels_N[rows], grad_N1[rows], exps_NV, total_N1)
        return grad_hidden, sums_VH.to(ctx.head_dtype), None, None


def _softmax_parts(hidden_NH: Tensor, head_VH: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp(logit - highest) [N, V], its sums [N, 1], and log p(label) [N], all in fp32."""
    labels_N1 = labels_N[:, None]
    logits_NV = (hidden_NH @ head_VH.T).float()
    logits_NV.sub_(logits_NV.amax(1, keepdim=True))
    label_logits_N1 = logits_NV.gather(1, labels_N1)
    exps_NV = logits_NV.exp_()
    total_N1 = exps_NV.sum(1, keepdim=True)
    return exps_NV, total_N1, (label_logits_N1 - total_N1.log()).squeeze(1)


def _head_gradient(
    hidden_NH: Tensor, labels_N: Tensor, grad_N1: Tensor, exps_NV: Tensor, total_N1: Tensor
) -> Tensor:
    """Return the gradient of sum(grad * log p(label)) for the head; `exps_NV` is used up.

    In the dtype of the other products: fp32 ones would take several times as long on a GPU.
    """
    slope_NV = exps_NV.mul_(-grad_N1 / total_N1)
    slope_NV.scatter_add_(1, labels_N[:, None], grad_N1)
    return slope_NV.to(hidden_NH.dtype).T @ hidden_NH


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
