"""Checkpoints of sharded weights: each process writes its rows into files of its own, next to the others'.

    weights.00000-of-00008.safetensors, ... rank-00001.json

When a process's files are on disk it leaves a note with their sizes and checksums. Rank 0 waits for all
notes, writes the manifest and lets the checkpoint appear: all of it or nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from msgspec import Struct

from shared.files import write_atomically

POLL_S = 0.05
MOST_WAIT_S = 1800.0  # for the slowest process's files
SHARDED = frozenset({"weights", "optimizer", "average"})  # groups of which each process has rows
SUFFIX = ".safetensors"


class FileEntry(Struct, frozen=True):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class Note(Struct, frozen=True):
    """What one process wrote, or why it could not."""

    files: dict[str, FileEntry] = {}
    error: str = ""
    errno: int = 0


class Writer(Struct, frozen=True):
    """One of the processes that write a checkpoint together, and the folder it is written into."""

    rank: int
    world: int
    folder: Path

    def file_name(self, group: str) -> str:
        """Return the name of this process's file of a group of tensors."""
        part = f".{self.rank:05d}-of-{self.world:05d}" if group in SHARDED else ""
        return f"{group}{part}{SUFFIX}"

    def leave(self, note: Note) -> None:
        """Say what was written, if the folder is still there: rank 0 may have given up."""
        if self.folder.is_dir():
            write_atomically(_place(self.folder, self.rank), msgspec.json.encode(note))

    def others(self) -> dict[str, FileEntry]:
        """Wait for all other processes' files. Raises OSError if one could not write, or none came."""
        files: dict[str, FileEntry] = {}
        until = time.monotonic() + MOST_WAIT_S
        for rank in range(1, self.world):
            place = _place(self.folder, rank)
            while not place.exists():
                if time.monotonic() > until:
                    raise OSError(f"rank {rank} has not written its part in {MOST_WAIT_S:.0f} s")
                time.sleep(POLL_S)
            note = msgspec.json.decode(place.read_bytes(), type=Note)
            if note.error:
                raise OSError(note.errno, f"rank {rank}: {note.error}")
            files |= note.files
            place.unlink()
        return files


def _place(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def group_of(file: str) -> str:
    """Return the group of tensors that a file holds, or holds a part of."""
    return file.partition(".")[0]


def blocks(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """Return by name the blocks of rows that the processes' files hold, first rows first.

    What isn't sharded, such as a step counter, is in rank 0's file only.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for name, rows in part.items():
            found.setdefault(name, []).append(rows)
    return found
