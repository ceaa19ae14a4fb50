"""Rotary frequencies that depend on how long a row is: each document gets those of its own row.

Beyond the model's original positions `longrope` takes other factors, and `dynamic` another base for each
length. Transformers goes by the highest position of a batch, and `dynamic` keeps the longest row's base until
a row within the original positions comes. So it is asked once for each length here.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import EngineError
from shared.messages.runs import ErrorCode
from trainer_node.engine.data.packing import Batch

Span = tuple[int, int]  # so many tokens of a pass, and the length of the row they are in
_pass = threading.local()  # `spans`: those of the pass that this thread computes


def go_by_row(model: nn.Module) -> int | None:
    """Let a model's rotary modules go by `spans` from now on.

    Returns how long a row may be without frequencies of its own; None: as long as it likes.
    """
    limits = []
    for module in model.modules():
        limit = _limit(module)
        if limit is None:
            continue
        limits.append(limit)
        if not isinstance(module.forward, _ByRow):
            module.forward = _ByRow(module.forward, limit)
    return min(limits, default=None)


def _limit(module: nn.Module) -> int | None:
    """Return the longest row for which a module's frequencies are the original ones; None: any row."""
    kinds: Any = getattr(module, "rope_type", None)
    parameters: Any = {}
    if isinstance(kinds, str):
        kinds = {None: kinds}
    if isinstance(kinds, dict):  # by type of layer
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    limits = []
    for layer, kind in (kinds or {}).items():
        if kind == "longrope":
            of_layer = parameters if layer is None else parameters[layer]
            limits.append(int(of_layer["original_max_position_embeddings"]))
        elif "dynamic" in kind:
            limits.append(int(module.original_max_seq_len))
    return min(limits, default=None)


def row_lengths(batch: Batch) -> list[int]:
    """Return the length of each document's row, int[D]: the scorer fills a pair up to its longer document."""
    lengths, group = batch.document_lengths[: batch.documents], batch.documents // batch.examples
    pairs = [lengths[start : start + group] for start in range(0, len(lengths), group)]
    return [max(pair) for pair in pairs for _ in pair]


@contextmanager
def spans(given: Sequence[Span]) -> Iterator[None]:
    """Let this thread's passes be of these rows, one after the other."""
    _pass.spans = given
    try:
        yield
    finally:
        _pass.spans = ()


class _ByRow:
    """The forward pass of a rotary module, called once for each length beyond the limit."""

    def __init__(self, stock: Callable[..., Any], limit: int) -> None:
        self._stock, self._limit = stock, limit
        self._lock = threading.Lock()  # threads compute passes at once, and the frequencies are one buffer

    def __deepcopy__(self, memo: dict[int, Any]) -> _ByRow:
        """Return what the copy of the module calls: its own forward pass, behind a lock of its own."""
        return _ByRow(copy.deepcopy(self._stock, memo), self._limit)

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return cosines and sines at every position, as the module does."""
        rows = [(tokens, row if row > self._limit else 0) for tokens, row in getattr(_pass, "spans", ())]
        with self._lock:
            if not any(row for _, row in rows):
                return self._stock(x, position_ids, *args, **kwargs)
            return self._by_row(rows, x, position_ids, *args, **kwargs)

    def _by_row(self, rows: list[Span], x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows_T = torch.repeat_interleave(*(torch.tensor(one) for one in list(zip(*rows, strict=True))[::-1]))
        axis, device = position_ids.dim() - 1, position_ids.device
        found, places = [], []
        for row in sorted({row for _, row in rows}):  # upwards: `dynamic` forgets no longer one
            places.append(torch.nonzero(rows_T == row).squeeze(1))
            asked = position_ids.index_select(axis, places[-1].to(device))
            # One more position says how long the row is: a pair's shorter document doesn't get that far.
            last = asked.new_full((*asked.shape[:-1], 1), max(0, row - 1))
            answer = self._stock(x, torch.cat([asked, last], axis), *args, **kwargs)
            found.append(_without_last(answer, axis, len(places[-1])))
        self._stock(x, torch.zeros_like(position_ids[..., :1]), *args, **kwargs)  # `dynamic` forgets
        order_T = torch.argsort(torch.cat(places)).to(device)
        whole = [torch.cat(parts, axis).index_select(axis, order_T) for parts in zip(*found, strict=True)]
        return tuple(whole) if isinstance(answer, tuple) else whole[0]


def _without_last(answer: Tensor | tuple[Tensor, ...], axis: int, tokens: int) -> list[Tensor]:
    parts = list(answer) if isinstance(answer, tuple) else [answer]
    if any(part.dim() <= axis or part.shape[axis] != tokens + 1 for part in parts):
        raise EngineError(
            ErrorCode.UNSUPPORTED,
            "rows beyond the model's original positions can't be trained: its rotary code is unknown",
        )
    return [part.narrow(axis, 0, tokens) for part in parts]
