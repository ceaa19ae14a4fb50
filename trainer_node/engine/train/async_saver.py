"""Checkpoints written during training: the run waits for a copy in memory, a thread puts it on disk.

SmolLM2-135M with dense deltas: 1.3 GB are copied in .1 s, and take 4.5 s to be hashed, written and synced.
The next step changes weights and moments alike, so the copy is of all of them. Where memory can't hold it,
what has no copy is written first, and the run waits for that part alone.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, takewhile
from pathlib import Path

import torch
from msgspec import Struct

from trainer_node.engine.distributed.checkpoint_parts import Writer
from trainer_node.engine.memory.copy_memory import CopyMemory
from trainer_node.engine.memory.oom import is_out_of_memory, release
from trainer_node.engine.train import checkpoint
from trainer_node.engine.train.checkpoint import Position, Tensors
from trainer_node.engine.train.disk_plan import (
    DESCRIPTIONS,
    SPARE_BYTES,
    CheckpointContent,
    Sizes,
    after_failure,
    choose,
    share_of,
)

MOMENTS_FILE = frozenset({"optimizer"})
Key = tuple[str, str]  # a group of tensors, and a name in it


class Written(Struct, frozen=True):
    """What one checkpoint took."""

    seconds: float  # from its begin until it was on disk
    cpu_s: float  # of it the thread computed: hashing, and the kernel's copying


class Saver:
    """Writes one checkpoint at a time below `folder`, the last one that was begun.

    `most_bytes` is the memory that copies may take; what goes beyond is written while the run waits.
    `timer` reads the run's clock, so that a simulated run's saves take no time. Of the free disk this one may
    use one of `sharers` parts. A checkpoint that can't be written does not end the run: `report` gets the
    reason, and the next one is smaller.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        versions: dict[str, str],
        *,
        most_bytes: float,
        timer: Callable[[], float],
        report: Callable[[str], None],
        sharers: int = 1,
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.versions = versions
        self.most_bytes = most_bytes
        self.timer = timer
        self.report = report
        self.sharers = sharers
        self._content = CheckpointContent.WHOLE  # of the checkpoint before
        self._most = CheckpointContent.WHOLE  # that is tried
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self.memory = CopyMemory(report)
        self._copies: dict[Key, torch.Tensor] = {}
        self._copies_bytes = 0
        self._preparing: Future[float] | None = None
        self._running: Future[Written | None] | None = None
        self._frozen: dict[str, tuple[Tensors, Path]] = {}  # what the checkpoint before holds, and where

    def prepare(self, tensors: Mapping[str, Tensors]) -> None:
        """Have memory for copies of these ready before the first save, which would wait for its first use.

        That costs ten times as much as later uses (1 to 3 s for 1.6 GB); here it is paid during training.
        What was for other tensors is freed.
        """
        wanted = by_key(tensors)

        def touch() -> float:
            computed = time.thread_time()
            of_these = [key for key in self._copies if tensors.get(key[0])]
            if not all(key in wanted and self._has_memory(key, wanted[key]) for key in of_these):
                self._forget()  # it was for another trial's weights
            for made in self._provide(wanted).values():
                if not made.is_pinned():  # pinned memory was touched when it was made
                    made.zero_()
            return time.thread_time() - computed

        self._preparing = self._pool.submit(touch)

    def make_room(self, sizes: Sizes, export_bytes: int) -> CheckpointContent:
        """Return what the next checkpoint can hold; older ones are deleted if it needs their place.

        Waits for the save before. Room for the export is left free.
        """
        self.wait()
        older = checkpoint.by_value(self.folder)[:-1]
        freed = [checkpoint.freed_by(one) for one in older]
        free, reserved = free_bytes(self.folder), export_bytes + SPARE_BYTES
        choice = choose(sizes, share_of(free, reserved, self.sharers), reserved, freed, self._most)
        for old in older[: choice.deleted]:
            shutil.rmtree(old)
        if choice.content is not self._content:
            self._content = choice.content
            self.report(f"{free / 1e9:.1f} GB of the disk are free: {DESCRIPTIONS[choice.content]}")
        return choice.content

    def begin(
        self,
        position: Position,
        tensors: Mapping[str, Tensors],
        *,
        content: CheckpointContent = CheckpointContent.WHOLE,
        still: bool = False,
        frozen: Mapping[str, Tensors] | None = None,
        writer: Writer | None = None,
    ) -> None:
        """Start to save; waits for the save before, if that is still running.

        `still` promises that the tensors don't change until `wait` returns: then no copy is made. Those in
        `frozen` never change: what the checkpoint before has of them is linked. `writer`: this process is one
        of several that write it, each what it holds.
        """
        self.wait()
        preparing_s = self._prepared()
        uncopied: list[torch.Tensor] = []  # training, which changes them, waits until the last one was read
        if not still:
            copies = self._copied(by_key(tensors))
            tensors = last_copied(tensors, copies)
            uncopied = [one for key, one in by_key(tensors).items() if key not in copies]
        read = threading.Event()
        fixed = dict(frozen or {})
        tensors = {**tensors, **fixed}
        unchanged = {name: path for name, (group, path) in self._frozen.items() if fixed.get(name) is group}
        # If another process's part fails, an earlier save of this step stays: its weights are others.
        again = checkpoint.folder_of(self.folder, position.step).exists()
        began = self.timer()

        def write() -> Written | None:
            computed = time.thread_time()
            narrow = MOMENTS_FILE if content is CheckpointContent.NARROW_MOMENTS else frozenset()
            try:
                folder = checkpoint.save(
                    self.folder,
                    position,
                    self.fingerprint,
                    tensors,
                    self.versions,
                    unchanged,
                    narrow,
                    writer,
                    lambda tensor: read.set() if uncopied and tensor is uncopied[-1] else None,
                )
            except OSError as error:
                self._failed(position.step, content, error)
                return None
            finally:
                read.set()
            files = {name: writer.file_name(name) if writer else f"{name}.safetensors" for name in fixed}
            self._frozen = {name: (group, folder / files[name]) for name, group in fixed.items() if not again}
            return Written(self.timer() - began, time.thread_time() - computed + preparing_s)

        self._running = self._pool.submit(write)
        if uncopied:
            read.wait()

    def written(self) -> Written | None:
        """Return what the newest written checkpoint took, once."""
        if self._running is None or not self._running.done():
            return None
        done, self._running = self._running, None
        return done.result()

    @property
    def is_writing(self) -> bool:
        """Return whether a checkpoint is still being written."""
        return self._running is not None and not self._running.done()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    def free(self) -> None:
        """Free the memory of copies, when training is over."""
        self.wait()
        self._prepared()
        self._forget()
        self._frozen = {}
        release()

    def _failed(self, step: int, content: CheckpointContent, error: OSError) -> None:
        """Note that a checkpoint could not be written; runs in the saver's thread."""
        self._most = max(self._most, after_failure(content))
        self.report(
            f"the checkpoint of step {step} could not be written: {error}; training goes on, and from now on "
            f"{DESCRIPTIONS[self._most]}"
        )

    def _prepared(self) -> float:
        """Wait for the memory, and tell once what it took of the thread's time."""
        if self._preparing is None:
            return 0.0
        preparing, self._preparing = self._preparing, None
        return preparing.result()

    def _copied(self, tensors: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        """Return copies of the tensors, of as many as memory is for."""
        self._provide(tensors)
        copied = {key: one for key, one in tensors.items() if self._has_memory(key, one)}
        for key, tensor in copied.items():
            self._copies[key].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in copied.values()):
            torch.cuda.current_stream().synchronize()  # the weights may change from now on
        return {key: self._copies[key] for key in copied}

    def _provide(self, tensors: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
        """Return new memory for those of the tensors that have none, the first ones, and keep it.

        Its first use costs ten times as much.
        """
        missing = {key: one for key, one in tensors.items() if not self._has_memory(key, one)}
        room = self.most_bytes - self._copies_bytes
        sizes = list(takewhile(lambda size: size <= room, self.memory.sizes(missing.values())))
        if not sizes:
            return {}
        try:
            made = self.memory.like(dict(islice(missing.items(), len(sizes))))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.most_bytes = self._copies_bytes  # a plan for less of a GPU's memory would not help
            self.report(f"main memory ran out ({error}): training waits for what has no copy")
            return {}
        self._copies_bytes += sizes[-1]
        self._copies |= made
        return made

    def _forget(self) -> None:
        self._copies, self._copies_bytes = {}, 0

    def _has_memory(self, key: Key, tensor: torch.Tensor) -> bool:
        kept = self._copies.get(key)
        return kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype

    def open(self, step: int) -> Path | None:
        """Make the folder for a checkpoint of several processes; None if that is impossible."""
        self.wait()  # for the one before, of all processes
        try:
            return checkpoint.open_temporary(self.folder, step)
        except OSError as error:
            self._failed(step, self._content, error)
            return None


def by_key(tensors: Mapping[str, Tensors]) -> dict[Key, torch.Tensor]:
    """Return tensors in groups by group and name."""
    return {(group, name): one for group, found in tensors.items() for name, one in found.items()}


def last_copied(
    tensors: Mapping[str, Tensors], copies: Mapping[Key, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Return copies in place of the tensors that have one; these, and groups of nothing else, come last."""
    groups = sorted(tensors, key=lambda group: all((group, name) in copies for name in tensors[group]))
    return {
        group: {
            name: copies.get((group, name), tensors[group][name])
            for name in sorted(tensors[group], key=lambda name: (group, name) in copies)
        }
        for group in groups
    }


def free_bytes(folder: Path) -> int:
    """Return the bytes that may still be written to the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(tensors: Tensors) -> int:
    """Return the bytes of some tensors; of a sharded one, all shards together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
