"""What the base model says where the score compares distributions: asked once, kept on disk.

A distribution over the vocabulary is its head's product with one hidden state, and the head isn't trained. So
`base_states.bin` in the run folder holds hidden states only, [K, H], of the development rows and then of
the training rows: .6% of what the distributions would take at a vocabulary of 150,000 and 896 dimensions.
It is read through the page cache, row by row. A resumed run reads it; without it the base model is asked
again, which it must still be wherever this is called.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from shared.files import write_atomically
from shared.json_files import read_json_if_possible
from shared.messages.offers import TaskType
from shared.messages.runs import WorkerJob
from shared.planning.plan import Plan
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.data.examples import BaseStates, Examples
from trainer_node.engine.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from trainer_node.engine.evaluate.metric import compared_states
from trainer_node.engine.evaluate.reference_logprobs import MOST_SHARE, PIECE, SURPLUS, chosen
from trainer_node.engine.model.exactness import label_model
from trainer_node.engine.model.label_model import LabelModel

FILE: Final = "base_states.bin"
ABOUT: Final = "base_states.json"
DISK_SHARE: Final = 0.5  # of what is free: checkpoints and the export need the rest


class About(Struct, frozen=True):
    """What the file holds."""

    fingerprint: str  # of the development and the training rows
    places: int
    hidden: int
    dtype: str  # numpy's; uint16 stands for bfloat16

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one place."""
        return self.hidden * np.dtype(self.dtype).itemsize


def wanted(job: WorkerJob) -> bool:
    """Return whether the job's score has a divergence from the base model."""
    return job.kl_coefficient > 0.0 and job.task_type in (TaskType.INSTRUCT, TaskType.CHAT)


def is_relative(job: WorkerJob, rows: Examples) -> bool:
    """Return whether the loss of a row is relative to the base model: of pairs, or with a divergence."""
    return rows.group == 2 or wanted(job)


def first(run: RunContext, model: torch.nn.Module, data: JobData, plan: Plan) -> JobData:
    """Return the rows with the base model's states: no more rows than the plan sees, and time and disk allow.

    Data of a job without such a score is returned as it is.
    """
    if not wanted(run.job):
        return data
    tokens = SURPLUS * plan.expected_steps * plan.packs_per_step * plan.capacity
    seen = math.ceil(tokens / float(data.train.lengths.mean()))
    count = len(data.train) if run.simulated else min(len(data.train), seen)
    data = replace(data, train=chosen(data.train, count, run.job.seed))
    asked = _asked(run, label_model(model), data)
    if isinstance(asked, str):
        run.reporter.message(f"trained without the divergence from the base model: {asked}")
        return data
    return asked


def again(
    run: RunContext, base: Callable[[], torch.nn.Module], data: JobData, record: RunRecord
) -> JobData | str:
    """Return the same rows with the same states, for a resumed run, or why they can't be had any more.

    `base` gives the base model. A run that began without the divergence goes on without it.
    """
    if not wanted(run.job):
        return data
    data = _recorded(run, data, record)
    if record.without_divergence:
        return data
    about = run.process_group.broadcast_object(_read(run.folder, data) if run.process_group.is_main else None)
    if about is not None:
        return _with_states(run, data, about)
    run.reporter.message(f"{FILE} is missing or of other rows: the base model is asked again")
    return _asked(run, label_model(base()), data, all_rows=True)


def _recorded(run: RunContext, data: JobData, record: RunRecord) -> JobData:
    """Return the rows that the run began with."""
    train = chosen(data.train, record.train_examples, run.job.seed)
    return replace(data, train=train, dev=data.dev.take(np.arange(len(record.base_losses))))


def _asked(run: RunContext, model: LabelModel, data: JobData, *, all_rows: bool = False) -> JobData | str:
    """Write the states of the development rows, and of the training rows that there is time and room for.

    Returns why if these are none, or with `all_rows` not all.
    """
    group, rows = run.process_group, len(data.train)
    about = group.broadcast_object(_allocated(run, model, data, all_rows=all_rows) if group.is_main else "")
    if isinstance(about, str):
        return about
    dev_starts, train_starts = _starts(data)
    fitting = int(np.searchsorted(train_starts + count_places(data.train), about.places, side="right"))
    train = data.train.take(np.arange(fitting)).with_base(BaseStates(None, train_starts[:fitting]))
    run.reporter.message(f"the base model reads {fitting} of {rows} rows, before training changes it")
    states = _opened(run.folder, about, "r+")
    until, done = run.clock.time() + MOST_SHARE * run.left_s, 0
    fill(states, model, data.dev.with_base(BaseStates(None, dev_starts)), group)
    while done < fitting and (not done or run.clock.time() < until):
        piece = np.arange(done, min(done + PIECE, fitting))
        fill(states, model, train.take(piece), group)
        done += len(piece)
        run.reporter.alive()
    states.flush()
    group.gather_objects(None)  # rank 0 waits for the others' rows
    if all_rows and done < rows:
        return "no time is left to ask the base model again"
    if done < rows:
        run.reporter.message(f"{done} of {rows} rows are trained on: no time or room to see more")
    data = replace(data, train=data.train.take(np.arange(done)))
    about = replace(about, fingerprint=_fingerprint(data))
    if group.is_main:
        write_atomically(run.folder / ABOUT, msgspec.json.encode(about))
    return _with_states(run, data, about)


def _allocated(run: RunContext, model: LabelModel, data: JobData, *, all_rows: bool) -> About | str:
    """Return a file with room for all rows, or for as many as the disk has room for; or why there is none.

    With `all_rows` for all or none.
    """
    hidden = int(model.base.get_output_embeddings().weight.shape[1])
    about = About("", 0, hidden, "uint16" if model.bf16 else "float32")
    wanted_places = int(data.dev.compared.sum() + data.train.compared.sum())
    room = int(DISK_SHARE * shutil.disk_usage(run.folder).free / about.row_bytes)
    about = replace(about, places=min(wanted_places, room))
    least = wanted_places if all_rows else int(data.dev.compared.sum() + count_places(data.train)[0])
    if about.places < least:
        return f"{FILE} needs more room than the disk has"
    try:
        (run.folder / ABOUT).unlink(missing_ok=True)
        with (run.folder / FILE).open(
            "wb"
        ) as file:  # a full disk is an error here, and death in a mapped file
            os.posix_fallocate(file.fileno(), 0, about.places * about.row_bytes)
    except OSError as error:
        (run.folder / FILE).unlink(missing_ok=True)
        return f"{FILE} can't be written: {error.strerror}"
    return about


def fill(
    states: NDArray[Any],
    model: torch.nn.Module,
    examples: Examples,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Collective: write what the model says at these documents' places to where each one's states begin."""
    for rows, found_KH in compared_states(model, examples, process_group=process_group):
        if states.dtype == np.uint16:
            states[rows] = found_KH.bfloat16().cpu().view(torch.uint16).numpy()
        else:
            states[rows] = found_KH.float().cpu().numpy()


def _with_states(run: RunContext, data: JobData, about: About) -> JobData:
    """Return the rows with what the file says of them."""
    states = _opened(run.folder, about, "r")
    parts = [
        rows.with_base(BaseStates(states, starts, _weight(run.job, rows)))
        for rows, starts in zip((data.dev, data.train), _starts(data), strict=True)
    ]
    return replace(data, dev=parts[0], train=parts[1])


def _weight(job: WorkerJob, rows: Examples) -> float:
    """Return what one place counts for in its row's loss: the mean over rows has the mean over all places."""
    return job.kl_coefficient * len(rows) / int(rows.compared.sum())


def _opened(folder: Path, about: About, mode: Literal["r", "r+"]) -> np.memmap[Any, Any]:
    return np.memmap(folder / FILE, about.dtype, mode, shape=(about.places, about.hidden))


def count_places(examples: Examples) -> NDArray[np.int64]:
    """Return how many places each document has where distributions are compared."""
    return np.add.reduceat(examples.compared, examples.offsets[:-1], dtype=np.int64)


def _starts(data: JobData) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each document's places begin in the file, of development and of training rows."""
    dev, train = count_places(data.dev), count_places(data.train)
    return np.cumsum(dev) - dev, dev.sum() + np.cumsum(train) - train


def _fingerprint(data: JobData) -> str:
    return f"{data.dev.fingerprint()}-{data.train.fingerprint()}"


def _read(folder: Path, data: JobData) -> About | None:
    """Return what the file holds if it is whole and of these rows."""
    about = read_json_if_possible(folder / ABOUT, About)
    if about is None or about.fingerprint != _fingerprint(data):
        return None
    try:
        whole = (folder / FILE).stat().st_size == about.places * about.row_bytes
    except OSError:
        return None
    return about if whole else None
