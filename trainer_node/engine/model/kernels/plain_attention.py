"""Causal attention in plain sums, for what no fused kernel does: soft-capped scores and sinks.

Scores exist for QUERIES rows at a time, also in the backward pass, which computes them again. Shape letters:
B rows, H heads, K heads of keys and values, T tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

QUERIES = 512  # 16 heads and 4,096 keys: 134 MB of scores in fp32


def plain_attention(
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of each token to itself and what is before it, [B, H, T, D].

    `softcap` bounds the scores smoothly; a head's sink is one more score, which takes weight and gives
    nothing.
    """
    times, parts = query_BHTD.shape[1] // key_BKTD.shape[1], []
    key, value = key_BKTD.repeat_interleave(times, 1), value_BKTD.repeat_interleave(times, 1)
    for start in range(0, query_BHTD.shape[2], QUERIES):
        rows = query_BHTD[:, :, start : start + QUERIES]
        end, first = start + rows.shape[2], 0 if window is None else max(0, start - window + 1)
        given = (rows, key[:, :, first:end], value[:, :, first:end], scale, window, softcap, sinks_H)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_rows, *given, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_rows(*given))
    return torch.cat(parts, 2)


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Return the last rows' part; the last key belongs to the last query."""
    scores = (query @ key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = scores.shape[2:]
    distance = torch.arange(keys - queries, keys, device=query.device)[:, None] - torch.arange(
        keys, device=query.device
    )
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    scores = scores.float().masked_fill(hidden, -torch.inf)
    if sinks_H is None:
        weights = torch.softmax(scores, 3)
    else:
        sinks = sinks_H.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, sinks], 3), 3)[..., :-1]
    return weights.to(value.dtype) @ value
