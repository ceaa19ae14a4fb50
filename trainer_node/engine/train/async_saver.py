"""Checkpoints written during training: the run waits for a copy in memory, a thread puts it on disk.

SmolLM2-135M with dense deltas: 1.3 GB are copied in .1 s, and take 4.5 s to be hashed, written and synced.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from msgspec import Struct

from trainer_node.engine.distributed.checkpoint_parts import Writer
from trainer_node.engine.oom import is_out_of_memory
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


class Written(Struct, frozen=True):
    """What one checkpoint took."""

    seconds: float  # from its begin until it was on disk
    cpu_s: float  # of it the thread computed: hashing, and the kernel's copying


class CopyMemory:
    """Gives memory for copies; pinned for a GPU's tensors: five times as fast (55 GB/s, H100).

    The system may allow less pinned memory than there is, and CUDA says then that it is out of memory. That
    is not the GPU's: from then on memory isn't pinned, which is reported once.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self.report = report
        self._pins = True

    def size_of(self, tensor: torch.Tensor) -> int:
        """Return the bytes that a copy takes: torch rounds pinned memory up to a power of two."""
        size = tensor.numel() * tensor.element_size()
        return 1 << max(0, size - 1).bit_length() if self._pins and tensor.is_cuda else size

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return memory for a copy of the tensor."""
        if self._pins and tensor.is_cuda:
            try:
                return torch.empty_like(tensor, device="cpu", pin_memory=True)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                cause = str(error).partition("\n")[0][:200]
            self._pins = False
            self.report(f"main memory can't be pinned ({cause}): weights are copied to it more slowly")
        return torch.empty_like(tensor, device="cpu")


class Saver:
    """Writes one checkpoint at a time below `folder`, the last one that was begun.

    `most_bytes` is the memory that copies may take; a larger checkpoint is written while the run waits.
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
        self._copies: dict[tuple[str, str], torch.Tensor] = {}
        self._preparing: Future[float] | None = None
        self._running: Future[Written | None] | None = None
        self._frozen: dict[str, tuple[Tensors, Path]] = {}  # what the checkpoint before holds, and where

    def prepare(self, tensors: Mapping[str, Tensors]) -> None:
        """Have memory for copies of these ready before the first save, which would wait for its first use.

        That costs ten times as much as later uses (1 to 3 s for 1.6 GB); here it is paid during training.
        What was for other tensors is freed.
        """
        fits = sum(map(size_of, tensors.values())) <= self.most_bytes
        given = tensors if fits else {}
        wanted = {(group, name): one for group, found in given.items() for name, one in found.items()}

        def touch() -> float:
            computed = time.thread_time()
            for key in self._copies.keys() - wanted.keys():  # of another trial's weights
                del self._copies[key]
            for key, tensor in wanted.items():
                if not self._has_memory(key, tensor):
                    self._copies[key] = self.memory.like(tensor).zero_()
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
        in_background = still or sum(map(size_of, tensors.values())) <= self.most_bytes
        if in_background and not still:
            tensors = {name: self._copied(name, group) for name, group in tensors.items()}
        fixed = dict(frozen or {})
        tensors = {**tensors, **fixed}
        unchanged = {name: path for name, (group, path) in self._frozen.items() if fixed.get(name) is group}
        began = self.timer()

        def write() -> Written | None:
            computed = time.thread_time()
            narrow = MOMENTS_FILE if content is CheckpointContent.NARROW_MOMENTS else frozenset()
            try:
                folder = checkpoint.save(
                    self.folder, position, self.fingerprint, tensors, self.versions, unchanged, narrow, writer
                )
            except OSError as error:
                self._failed(position.step, content, error)
                return None
            self._frozen = {name: (group, folder / f"{name}.safetensors") for name, group in fixed.items()}
            return Written(self.timer() - began, time.thread_time() - computed + preparing_s)

        self._running = self._pool.submit(write)
        if not in_background:
            self._running.result()

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

    def _copied(self, group: str, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Return a copy of the tensors, in memory that is kept: its first use costs ten times as much."""
        for name, tensor in tensors.items():
            if not self._has_memory((group, name), tensor):
                self._copies[group, name] = self.memory.like(tensor)
            self._copies[group, name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()  # the weights may change from now on
        return {name: self._copies[group, name] for name in tensors}

    def _has_memory(self, key: tuple[str, str], tensor: torch.Tensor) -> bool:
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


def free_bytes(folder: Path) -> int:
    """Return the bytes that may still be written to the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_of(tensors: Tensors) -> int:
    """Return the bytes of some tensors; of a sharded one, all shards together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
