"""The hidden states at places of a batch, from documents in one pack or in padded rows.

Shape letters: T tokens of a pack, N places, B rows, L tokens of a row, H hidden size.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer_node.engine.data.packing import Batch
from trainer_node.engine.data.token_noise import uniform
from trainer_node.engine.model.attention import attention_kwargs
from trainer_node.engine.model.rotary import row_lengths, spans

DRAWN_AT_ONCE = 2**22  # numbers of noise: 32 MiB of integers
_lock = threading.Lock()
_pass = threading.local()  # `noise`: that of the pass which this thread computes


def packed_states(
    decoder: Any, batch: Batch, positions_N: Tensor, documents_N: Tensor, rotary_limit: int | None = None
) -> Tensor:
    """Compute one pass over the pack as it is, [N, H]: the decoder's attention must keep documents apart.

    Rows of more than `rotary_limit` tokens have rotary frequencies of their own.
    """
    takes = inspect.signature(decoder.forward).parameters
    positions = {"position_ids": batch.positions_T[None]} if "position_ids" in takes else {}
    rows = []
    if rotary_limit is not None and batch.document_lengths:
        # The padding is a document with one position only: its row counts as short.
        rows = list(zip(batch.document_lengths, [*row_lengths(batch), 0], strict=False))
    with spans(rows), noisy(decoder, batch.noise_seeds_T, batch.noise_most_T):
        hidden_1TH = decoder(
            input_ids=batch.ids_T[None], use_cache=False, **positions, **attention_kwargs(batch)
        ).last_hidden_state
    return hidden_1TH[0].index_select(0, positions_N)


def padded_states(
    decoder: Any, batch: Batch, positions_N: Tensor, documents_N: Tensor, rotary_limit: int | None = None
) -> Tensor:
    """Passes over rows of one document each, [N, H]; nothing is asked of the decoder but that it is causal.

    Rows are filled up on the right, where no earlier token can see it: so they need no mask either. Each pass
    holds documents of about one length, and no more tokens than the pack. Rows of more than `rotary_limit`
    tokens share one only with those of exactly their length.
    """
    lengths = batch.document_lengths[: batch.documents]
    rows = [0] * len(lengths)
    if rotary_limit is not None:
        rows = [row if row > rotary_limit else 0 for row in row_lengths(batch)]
    starts_D = batch.cu_seqlens[: batch.documents].long()
    within_N = positions_N - starts_D[documents_N]
    states, places = [], []
    for documents in rows_of_one_length(lengths, len(batch.ids_T), rows):
        longest = max(lengths[index] for index in documents)
        documents_B = torch.tensor(documents, device=starts_D.device)
        last_B = torch.tensor([lengths[index] - 1 for index in documents], device=starts_D.device)
        columns_BL = torch.arange(longest, device=starts_D.device).minimum(last_B[:, None])
        tokens_BL = starts_D[documents_B, None] + columns_BL
        ids_BL = batch.ids_T[tokens_BL]
        noise = [one if one is None else one[tokens_BL] for one in (batch.noise_seeds_T, batch.noise_most_T)]
        with spans([(longest, rows[documents[0]])]), noisy(decoder, *noise):
            hidden_BLH = decoder(input_ids=ids_BL, use_cache=False).last_hidden_state
        row_D = torch.full((len(lengths),), -1, device=starts_D.device)
        row_D[documents_B] = torch.arange(len(documents), device=starts_D.device)
        row_N = row_D[documents_N]
        found = torch.nonzero(row_N >= 0).squeeze(1)
        states.append(hidden_BLH[row_N[found], within_N[found]])
        places.append(found)
    return torch.cat(states)[torch.argsort(torch.cat(places))]


def rows_of_one_length(lengths: list[int], most_tokens: int, rows: list[int]) -> Iterator[list[int]]:
    """Indices of all documents, longest first, in groups that hold at most so many tokens when padded.

    Documents whose `rows` differ are in different groups.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-rows[index], -lengths[index])):
        full = group and (len(group) + 1) * lengths[group[0]] > most_tokens
        if full or (group and rows[index] != rows[group[0]]):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@contextmanager
def noisy(decoder: Any, seeds: Tensor | None, most: Tensor | None) -> Iterator[None]:
    """Let this thread's passes have noise by these seeds, of at most so much times 1 / sqrt(hidden size).

    Each has the shape of the passes' ids, but for a first axis of one row.
    """
    if seeds is None or most is None:
        yield
        return
    embeddings = decoder.get_input_embeddings()
    with _lock:  # once, however many passes and threads there are: each hook would add the noise again
        if _with_noise not in embeddings._forward_hooks.values():
            embeddings.register_forward_hook(_with_noise)
    _pass.noise = (seeds, most)
    try:
        yield
    finally:
        _pass.noise = None


def _with_noise(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor | None:
    noise = getattr(_pass, "noise", None)
    if noise is None:
        return None
    width = embedded.shape[-1]
    # The integers that it is drawn by take 8 bytes a number, several times over: of a few tokens at a time.
    rows = max(1, DRAWN_AT_ONCE // width)
    parts = zip(*(one.reshape(-1).split(rows) for one in noise), strict=True)
    drawn = [
        (uniform(seeds, width) * (most[:, None] * width**-0.5)).to(embedded.dtype) for seeds, most in parts
    ]
    return embedded + torch.cat(drawn).view(embedded.shape)
