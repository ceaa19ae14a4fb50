"""Checkpoints of sharded weights: each process writes its rows into files of its own, next to the others'.

    weights.00000-of-00008.safetensors, ... rank-00001.json

When a process's files are on disk it leaves a note with their sizes and checksums, else one that says why
they are not. Rank 0 waits for all notes, writes the manifest and lets the checkpoint appear: all of it or
nothing.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import torch
from msgspec import Struct

from shared.errors import in_a_line
from shared.files import write_atomically
from shared.json_files import DamagedFileError, load_json
from trainer_node.engine.safetensors_file import FileEntry

POLL_S = 0.05
MOST_WAIT_S = 1800.0  # for the slowest process's files
MOST_TRIES = 20  # to delete a folder: files that were being opened in it may appear meanwhile
SUFFIX = ".safetensors"


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
        return f"{group}.{self.rank:05d}-of-{self.world:05d}{SUFFIX}"

    def leave(self, note: Note) -> None:
        """Say what was written, if the folder is still there: rank 0 may have given up. Raises OSError."""
        if self.folder.is_dir():
            write_atomically(_place(self.folder, self.rank), msgspec.json.encode(note))

    def give_up(self, groups: Collection[str], error: Exception) -> None:
        """Say why these groups of tensors could not be written; what there is of them is removed first.

        On a full disk the note would not fit otherwise. If it doesn't even so, the folder is taken away: that
        takes no room, and rank 0 sees it.
        """
        for group in groups:
            with suppress(OSError):
                (self.folder / self.file_name(group)).unlink()
        try:
            self.leave(_note_on(error))
        except OSError:
            take_away(self.folder, self.rank)

    def others(self) -> dict[str, FileEntry]:
        """Wait for all other processes' files. Raises OSError when one could not write, or none came."""
        files: dict[str, FileEntry] = {}
        waiting = set(range(1, self.world))
        until = time.monotonic() + MOST_WAIT_S
        while True:
            for rank in sorted(waiting):
                note = self._note_of(rank)
                if note is not None:
                    files |= note.files
                    waiting.remove(rank)
            if not waiting:
                return files
            if not self.folder.is_dir():
                raise OSError("another process could not write its part, nor say why")
            if time.monotonic() > until:
                raise OSError(f"rank {min(waiting)} has not written its part in {MOST_WAIT_S:.0f} s")
            time.sleep(POLL_S)

    def _note_of(self, rank: int) -> Note | None:
        """Take another process's note; None if it isn't there yet. Raises OSError if it could not write."""
        place = _place(self.folder, rank)
        try:
            note = load_json(place, Note)
        except FileNotFoundError:
            return None
        except DamagedFileError as error:
            raise OSError(str(error)) from error
        if note.error:
            text = f"rank {rank}: {note.error}"
            raise OSError(note.errno, text) if note.errno else OSError(text)
        place.unlink()
        return note


def take_away(folder: Path, rank: int = 0) -> None:
    """Delete a folder into which other processes may still write, under a name where they don't find it.

    A file that appeared while it was deleted would keep it, and the disk may be full.
    """
    taken = folder.with_name(f"{folder.name}-{rank}")
    with suppress(OSError):
        os.rename(folder, taken)
    for _ in range(MOST_TRIES):
        shutil.rmtree(taken, ignore_errors=True)
        if not taken.exists():
            return
        time.sleep(POLL_S)


def _note_on(error: Exception) -> Note:
    if isinstance(error, OSError) and error.errno:
        return Note(error=error.strerror or str(error), errno=error.errno)
    return Note(error=in_a_line(error))


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
