"""Find the fastest way to batch documents in which they come out as alone; refuse a model without one.

Nothing is taken from a model's name: three short documents go through the stock model one by one, and then
through each batching. A document that moves when its neighbour changes shows a leak that no tolerance hides:
in the same shapes the same numbers come out the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.errors import EngineError
from shared.messages.runs import ErrorCode
from shared.planning.architectures import Batching
from trainer_node.engine.data.examples import IGNORED, Examples
from trainer_node.engine.data.packing import Batch, collate
from trainer_node.engine.model.attention import install
from trainer_node.engine.model.label_model import LabelModel
from trainer_node.engine.model.own_head import has_plain_head

LENGTHS = (4, 8, 5)
# Relative, against the stock model: in bf16 other kernels round otherwise, in fp32 hardly.
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-3}
# Absolute. Experts get other numbers of tokens when a neighbour changes, and products of other sizes round
# otherwise; a document of any other model must not move by one bit.
EXPERTS_MOVE = 0.02


def label_model(network: nn.Module, *, bf16: bool | None = None) -> LabelModel:
    """Return a network that scores in the fastest exact batching; a LabelModel is returned unchanged.

    `bf16`: run matrix products in bf16 (default: if the weights are bf16). Raises EngineError(UNSUPPORTED) if
    in no batching the network gives what it gives document by document.
    """
    if isinstance(network, LabelModel):
        return network
    if bf16 is None:
        bf16 = next(network.parameters()).dtype == torch.bfloat16
    model = LabelModel(network, bf16)
    choose_batching(model)
    return model


def choose_batching(model: LabelModel, batchings: Iterable[Batching] = Batching) -> None:
    """Set the model's batching and head; EngineError(UNSUPPORTED) with what each batching lacks."""
    training = model.training
    model.eval()
    try:
        _choose(model, batchings)
    finally:
        model.train(training)


@torch.no_grad()
def _choose(model: LabelModel, batchings: Iterable[Batching]) -> None:
    name = type(model.base).__name__
    try:
        use_stock_attention(model.base)
        rows = _documents(_vocabulary(model.base))
        wanted_N, model.plain_head = model.answer(partial(_stock_head, model, rows))
        _check_direction(model, rows, wanted_N)
    except Exception as error:
        raise _unsupported(name, {"as it is": _cause(error)}) from error
    lacks: dict[str, str] = {}
    for batching in batchings:
        model.batching = batching
        try:
            if batching is Batching.PACKED:
                install(model.base)
            else:
                use_stock_attention(model.base)
            fault = _fault(model, rows, wanted_N)
        except Exception as error:
            fault = _cause(error)
        if fault is None:
            return
        lacks[batching.value] = fault
    raise _unsupported(name, lacks)


def _check_direction(model: LabelModel, rows: Examples, wanted_N: Tensor) -> None:
    """Check that a text's last token moves nothing before it. Raises EngineError(UNSUPPORTED)."""
    last = rows.offsets[1:] - 1
    ids = rows.ids.copy()
    ids[last] = (ids[last] + 1) % (int(ids.max()) + 1)
    other = partial(_stock, model, Examples(ids, rows.labels, rows.offsets))  # the same labels are asked for
    found_N, _ = model.answer(other)
    moved = float((found_N - wanted_N).abs().max())
    if not moved <= _tolerance(model, wanted_N):
        text = f"it is no causal model: later tokens move earlier ones by {moved:.2g}"
        raise EngineError(ErrorCode.UNSUPPORTED, text)


def _tolerance(model: LabelModel, wanted_N: Tensor) -> float:
    kind = torch.bfloat16 if model.bf16 else torch.float32
    return TOLERANCE[kind] * (1 + float(wanted_N.abs().max()))


def use_stock_attention(base: PreTrainedModel) -> None:
    """Let a model attend as its own code does, in the faster of the ways that it knows."""
    if base._can_set_attn_implementation():
        base.set_attn_implementation("sdpa" if base._supports_sdpa else "eager")


def _fault(model: LabelModel, rows: Examples, wanted_N: Tensor) -> str | None:
    """Return what is wrong with the model's present batching, or None."""
    device = wanted_N.device
    found_N = model(_batch(rows, device))
    error = float((found_N - wanted_N).abs().max())
    if not error <= _tolerance(model, wanted_N):
        return f"its log-probabilities are off by {error:.2g}"
    ids = rows.ids.copy()
    ids[: LENGTHS[0]] = (ids[: LENGTHS[0]] + 1) % (int(ids.max()) + 1)  # another first document
    labels = np.where(rows.labels == IGNORED, IGNORED, ids)
    other_N = model(_batch(Examples(ids, labels, rows.offsets), device))
    moved = float((other_N - found_N)[LENGTHS[0] - 1 :].abs().max())
    if not moved <= (EXPERTS_MOVE if _has_experts(model.base) else 0.0):
        return f"a document's log-probabilities move by {moved:.2g} with the document before it"
    return None


def _documents(vocabulary: int) -> Examples:
    """Three random documents, labelled from their second token on."""
    ids = np.random.default_rng(0).integers(0, vocabulary, sum(LENGTHS), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    labels = ids.copy()
    labels[offsets[:-1]] = IGNORED
    return Examples(ids, labels, offsets)


def _batch(rows: Examples, device: torch.device) -> Batch:
    return collate(rows, list(range(len(rows))), sum(LENGTHS), device)


def _stock_head(model: LabelModel, rows: Examples) -> tuple[Tensor, bool]:
    """Return each label's log-probability by the model's own code, [N], and whether its head is plain."""
    wanted_N, hidden_NH = _stock(model, rows)
    with _autocast(model):
        return wanted_N, has_plain_head(model.base, hidden_NH)


def _stock(model: LabelModel, rows: Examples) -> tuple[Tensor, Tensor]:
    """Return each label's log-probability by the model's own forward pass, [N], and hidden states, [N, H]."""
    base = model.base
    batch = _batch(rows, base.get_input_embeddings().weight.device)
    logits, hidden = [], []
    with _autocast(model):
        for ids in batch.ids_T.split(batch.document_lengths):
            logits.append(base(input_ids=ids[None], use_cache=False).logits[0])
            hidden.append(base.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0])
    logp_TV = torch.log_softmax(torch.cat(logits).float(), 1)
    return logp_TV[batch.label_positions_N, batch.labels_N], torch.cat(hidden)[batch.label_positions_N]


def _autocast(model: LabelModel) -> torch.autocast:
    device = model.base.get_input_embeddings().weight.device
    return torch.autocast(device.type, torch.bfloat16, enabled=model.bf16)


def _vocabulary(base: PreTrainedModel) -> int:
    """Return how many token ids are ordinary text for sure: a wrapper's last ones may stand for images."""
    return max(2, int(base.config.get_text_config().vocab_size * 0.9))


def _has_experts(base: PreTrainedModel) -> bool:
    config = base.config.get_text_config()
    return any(getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))


def _unsupported(name: str, lacks: dict[str, str]) -> EngineError:
    text = "; ".join(f"{how}, {fault}" for how, fault in lacks.items())
    return EngineError(ErrorCode.UNSUPPORTED, f"{name} can't be trained: {text}")


def _cause(error: Exception) -> str:
    """Return a model's error in one line; running out of memory is not the model's fault."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error).lower():
        raise error
    if isinstance(error, EngineError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
