"""What the base model says about preference pairs: asked once, before the first step, and kept on disk.

`reference.safetensors` in the run folder holds the log-probabilities, fp32[N, 2] (chosen, rejected), of the
pairs that are trained on and of the development pairs. A resumed run reads them. If the file is lost or of
other rows, the base model is asked again, which it must still be wherever this is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shared.files import write_atomically
from shared.planning.plan import Plan
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.evaluate.metric import reference_logprobs

FILE = "reference.safetensors"
PIECE = 64  # pairs between two looks at the clock
SURPLUS = 1.2  # more pairs than the plan expects to see: training may turn out faster
MOST_SHARE = 0.5  # of the time left, if the machine turns out slower than measured: then fewer pairs are used


def first(run: RunContext, model: torch.nn.Module, data: JobData, plan: Plan) -> JobData:
    """Return the pairs to train on, with their references: no more than the plan will see, if time is short.

    The development pairs have theirs already, from the baseline. Data without pairs is returned as it is.
    """
    if data.train.group == 1:
        return data
    tokens = plan.expected_steps * plan.packs_per_step * plan.capacity
    seen = math.ceil(SURPLUS * tokens / float(data.train.lengths.mean()))
    count = len(data.train) if run.simulated else min(len(data.train), seen)
    run.reporter.message(
        f"the base model scores {count} of {len(data.train)} pairs, before training changes it"
    )
    train = _ask(run, model, chosen(data.train, count, run.job.seed))
    if len(train) < len(data.train):
        run.reporter.message(f"{len(train)} of {len(data.train)} pairs are trained on: no time to see more")
    if run.process_group.is_main:
        _write(run.folder, train, data.dev)
    return replace(data, train=train)


def again(run: RunContext, base: Callable[[], torch.nn.Module], data: JobData, record: RunRecord) -> JobData:
    """Return the same pairs with the same references, for a resumed run; `base` gives the base model."""
    if data.train.group == 1:
        return data
    train = chosen(data.train, record.train_examples, run.job.seed)
    dev = data.dev.take(np.arange(len(record.base_losses)))
    known = run.process_group.broadcast_object(
        _read(run.folder, train, dev) if run.process_group.is_main else None
    )
    if known is None:
        run.reporter.message(f"{FILE} is missing or of other rows: the base model is asked again")
        model = base()
        asked = [reference_logprobs(model, part, process_group=run.process_group) for part in (train, dev)]
        train, dev = train.with_reference(asked[0]), dev.with_reference(asked[1])
        if run.process_group.is_main:
            _write(run.folder, train, dev)
    else:
        train, dev = train.with_reference(known[0]), dev.with_reference(known[1])
    return replace(data, train=train, dev=dev)


def chosen(train: Examples, count: int, seed: int) -> Examples:
    """Return `count` of the pairs: the first ones in an order that the seed decides."""
    return train.take(np.random.default_rng(seed).permutation(len(train))[:count])


def _ask(run: RunContext, model: torch.nn.Module, train: Examples) -> Examples:
    """Compute references for as many pairs as there is time for."""
    until = run.clock.time() + MOST_SHARE * run.left_s
    parts: list[NDArray[np.float32]] = []
    while len(parts) * PIECE < len(train) and (not parts or run.clock.time() < until):
        start = len(parts) * PIECE
        piece = train.take(np.arange(start, min(start + PIECE, len(train))))
        parts.append(reference_logprobs(model, piece, process_group=run.process_group))
        run.reporter.alive()
    reference = np.concatenate(parts)
    return train.take(np.arange(len(reference) // train.group)).with_reference(reference)


def _fingerprint(train: Examples, dev: Examples) -> str:
    return f"{train.fingerprint()}-{dev.fingerprint()}"


def _write(folder: Path, train: Examples, dev: Examples) -> None:
    parts = {"train": train.reference, "dev": dev.reference}
    tensors = {name: part.reshape(-1, 2) for name, part in parts.items() if part is not None}
    write_atomically(folder / FILE, save(tensors, {"fingerprint": _fingerprint(train, dev)}))


def _read(
    folder: Path, train: Examples, dev: Examples
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return both sets' references if the file is whole and of these rows."""
    try:
        with safe_open(folder / FILE, "numpy") as file:
            if (file.metadata() or {}).get("fingerprint") != _fingerprint(train, dev):
                return None
            return file.get_tensor("train").ravel(), file.get_tensor("dev").ravel()
    except (FileNotFoundError, SafetensorError):
        return None
