"""The proof that stock transformers and peft read a submission as it was trained.

Reloaded in the dtype that was trained in: fp32 of a 32B model takes 128 GB. A model that no GPU has room for
is spread over them and main memory, layer by layer. What can't be loaded because memory ran out is not wrong,
only not verified.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import dispatch_model, infer_auto_device_map
from msgspec import Struct
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from shared.messages.runs import WorkerJob
from shared.planning.hardware import machine_memory
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import collate
from trainer_node.engine.evaluate.metric import Evaluation
from trainer_node.engine.memory.oom import is_out_of_memory
from trainer_node.engine.model.adapters import load_adapter
from trainer_node.engine.model.loading import load_model
from trainer_node.engine.model.own_head import own_logits
from trainer_node.engine.objectives import dpo

TOLERANCE = 0.02  # nats between the trained model and its export: bf16 rounding of weights costs up to .005
PER_LABEL = 0.005  # of it per label token
# SmolLM2-135M, which knows no German, was off by +.021 on 12 rows of it and by -.027 on 14. With the same
# bf16 weights a row differs by .03 (standard deviation), .08 at most, between a pack and a pass of its own.
STANDARD_ERRORS, CHANCE_ROWS, MOST_BY_CHANCE = 3.0, 8, 0.1
LEAST_ROWS = 2
ROOM = 3 * 2**30  # bytes of a GPU left free for what computing takes


class ExportProblem(Struct, frozen=True):
    """What is wrong with an export, and its own loss row by row, if it has one."""

    text: str
    losses: list[float] = []


class UnverifiedError(Exception):
    """The files may be right: there was not the memory to load them."""


def verify(
    folder: Path,
    job: WorkerJob,
    dev: Examples,
    trained: Evaluation | None,
    limit_s: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> ExportProblem | None:
    """Reload the submission with stock transformers and peft and score development rows one by one.

    As many rows as `limit_s` allows, at least two. Returns what is wrong, or None. `trained` is the score of
    the same weights before the export, on the first rows or on all; without it the files need only load and
    give finite losses. Raises UnverifiedError if memory doesn't suffice.
    """
    if trained is not None:
        dev = dev.take(np.arange(min(len(dev), len(trained.per_example))))
    try:
        model = _placed(_reload(folder, job, dtype), device)
        if dev.base is not None and hasattr(model, "hf_device_map"):
            raise UnverifiedError("the divergence of a model that is spread over devices isn't computed")
        losses = _losses(model, dev, limit_s, device, dtype)
    except (OSError, ValueError, RuntimeError, MemoryError, KeyError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise UnverifiedError(f"memory ran out: {str(error).partition(chr(10))[0]}") from error
        return ExportProblem(f"the exported files don't load: {error}")
    found = float(np.mean(losses))
    if not np.isfinite(found):
        return ExportProblem(f"the exported files give a loss of {found}")
    gaps = np.array(losses) - trained.per_example[: len(losses)] if trained else np.zeros(1)
    if abs(gaps.mean()) > tolerance(dev.take(np.arange(len(losses))), gaps):
        text = (
            f"the exported files score {found:.4f} instead of {found - gaps.mean():.4f} on {len(losses)} rows"
        )
        return ExportProblem(text, losses)
    return None


def tolerance(rows: Examples, gaps: NDArray[np.float64]) -> float:
    """Return how far the loss of an export may be from that of the trained model, which is off by `gaps`.

    A preference pair's loss follows the sum over its labels, times beta, at a slope of one half at most: a
    bf16 error of PER_LABEL in each of them may add up. Where rows differ either way, their mean over a few
    rows is chance.
    """
    least = TOLERANCE
    if rows.group > 1:
        least = max(TOLERANCE, 0.5 * dpo.BETA * PER_LABEL * rows.label_tokens / len(rows))
    if len(gaps) < CHANCE_ROWS:
        return least
    return max(least, min(MOST_BY_CHANCE, STANDARD_ERRORS * float(gaps.std(ddof=1)) / math.sqrt(len(gaps))))


def _reload(folder: Path, job: WorkerJob, dtype: torch.dtype) -> nn.Module:
    """Load the submission on the CPU: an adapter on its base, or a whole model."""
    adapter = (folder / "adapter_config.json").exists()
    needed = sum(_bytes(place, dtype) for place in ([Path(job.model_path), folder] if adapter else [folder]))
    if needed > (free := _free_main_memory()):
        raise UnverifiedError(
            f"loading it takes {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB of memory are free"
        )
    if adapter:
        return load_adapter(load_model(job.model_path, dtype), str(folder))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()


def _bytes(folder: Path, dtype: torch.dtype) -> float:
    """Memory for a folder's bf16 weights; 0 if that isn't known in advance."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) * dtype.itemsize / 2


def _free_main_memory() -> float:
    """Return the bytes that can be had without swapping; infinite where the system doesn't tell."""
    try:
        return machine_memory()[1]
    except OSError:
        return float("inf")


def _placed(model: Any, device: torch.device) -> Any:
    """Place the model where there is room: on the GPU with most of it, or on all of them and main memory."""
    if device.type != "cuda":
        return model.to(device)
    torch.cuda.empty_cache()
    room = {gpu: torch.cuda.mem_get_info(gpu)[0] - ROOM for gpu in range(torch.cuda.device_count())}
    best = max(room, key=lambda gpu: room[gpu])
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if size < room[best]:
        return model.to(torch.device("cuda", best))
    return spread(model, {**{gpu: max(0, free) for gpu, free in room.items()}, "cpu": size})


def spread(model: Any, room: dict[int | str, int]) -> Any:
    """Place whole layers of the model on several devices; those in main memory visit a GPU when needed."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    places = infer_auto_device_map(
        model, max_memory=room, no_split_module_classes=list(base._no_split_modules or [])
    )
    return dispatch_model(model, places)


def _losses(
    model: Any, dev: Examples, limit_s: float, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Return the scorer's losses of the first rows."""
    losses: list[float] = []
    until = time.monotonic() + limit_s
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.inference_mode(), autocast:
        for index in range(len(dev)):
            if len(losses) >= LEAST_ROWS and time.monotonic() > until:
                break
            losses.append(stock_loss(model, dev.take([index])))
    return losses


def stock_loss(model: Any, example: Examples) -> float:
    """Return the scorer's loss of one row, from plain logits."""
    if example.group == 1:
        return _nll(model, example.ids, example.labels, "mean") + _divergence(model, example)
    spans = [slice(start, end) for start, end in pairwise(example.offsets.tolist())]
    logp_D = torch.tensor([-_nll(model, example.ids[span], example.labels[span], "sum") for span in spans])
    reference = None if example.reference is None else torch.from_numpy(example.reference)
    return float(dpo.pair_losses(logp_D, reference))


def _divergence(model: Any, example: Examples) -> float:
    """Return what the divergence from the base model adds to a row's loss, from whole distributions."""
    if example.base is None:
        return 0.0
    places = collate(example, [0], len(example.ids)).compared
    assert places is not None
    assert places.states_KH is not None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = next(model.parameters()).device
    ids_1T = torch.from_numpy(example.ids.astype(np.int64))[None].to(device)
    logits_KV = model(input_ids=ids_1T, use_cache=False).logits[0][places.positions_K.to(device)]
    logp_KV = torch.log_softmax(logits_KV.float(), 1)
    base_KV = torch.log_softmax(own_logits(base)(places.states_KH.to(device, logits_KV.dtype)).float(), 1)
    return places.weight * float((logp_KV.exp() * (logp_KV - base_KV)).sum())


def _nll(model: Any, ids: NDArray[np.int32], labels: NDArray[np.int32], reduction: str) -> float:
    """Negative log-likelihood of one document's labels."""
    place = next(model.parameters()).device
    ids_1T = torch.from_numpy(ids.astype(np.int64))[None]
    if place.type != "meta":  # where a model is spread, its first layer fetches what it needs
        ids_1T = ids_1T.to(place)
    logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float()
    labels_T = torch.from_numpy(labels.astype(np.int64)).to(logits_TV.device)
    return float(nn.functional.cross_entropy(logits_TV[:-1], labels_T[1:], reduction=reduction))
