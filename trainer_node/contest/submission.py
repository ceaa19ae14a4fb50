"""The one folder that upstream uploads: complete at every moment, replaced by one rename.

A new submission is put together next to it, on the same file system, synced, looked at, and then exchanged
with what is there: `renameat2(RENAME_EXCHANGE)`, so that a kill at any moment leaves one or the other whole.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from shared.errors import PodiumError
from shared.files import sync
from trainer_node.contest.validity import objections

AT_FDCWD: Final = -100
RENAME_EXCHANGE: Final = 2
CAN_NOT: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class InvalidSubmissionError(PodiumError):
    """What should become the submission is nothing that upstream would take."""


class SubmissionFolder:
    """The folder, and where its next content is put together."""

    def __init__(self, path: Path, base: Path) -> None:
        self.path = path
        self.base = base
        self._staged = path.with_name(f".staged-{path.name}")

    def objections(self) -> list[str]:
        """Return what upstream would object to in what lies there now."""
        return objections(self.path, self.base)

    def prepare(self) -> None:
        """Remove what a killed container left half-way; what it submitted stays, or comes back."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = _aside(self.path)
        if aside.exists() and not self.path.exists():  # killed between two renames
            os.rename(aside, self.path)
            sync(self.path.parent)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(self._staged, ignore_errors=True)

    def install(self, fill: Callable[[Path], None]) -> None:
        """Replace the content by what `fill` puts into an empty folder.

        Raises InvalidSubmissionError, and whatever `fill` raises; the content then stays what it was.
        """
        shutil.rmtree(self._staged, ignore_errors=True)
        self._staged.mkdir(parents=True)
        try:
            fill(self._staged)
            for path in (*self._staged.iterdir(), self._staged):
                sync(path)
            if wrong := objections(self._staged, self.base):
                raise InvalidSubmissionError("; ".join(wrong))
            replace_folder(self._staged, self.path)
            sync(self.path.parent)
        finally:
            shutil.rmtree(self._staged, ignore_errors=True)


def linked(export: Path) -> Callable[[Path], None]:
    """Return what fills a folder with the files of an export, linked where that is possible."""

    def fill(folder: Path) -> None:
        for path in sorted(export.iterdir()):
            if not path.is_file():
                continue
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)

    return fill


def replace_folder(new: Path, old: Path) -> None:
    """Put a folder in another one's place; the other one's content is then at the first path, or gone.

    Where the file system can't exchange two folders, the gap between two renames remains; a kill in it leaves
    the other one aside. Raises OSError; the other one then stays where it was.
    """
    if not old.exists():
        os.rename(new, old)
        return
    try:
        exchange(new, old)
    except OSError as error:
        if error.errno not in CAN_NOT:
            raise
        aside = _aside(old)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    """Return where a submission is between two renames."""
    return path.with_name(f".replaced-{path.name}")


def exchange(one: Path, other: Path) -> None:
    """Exchange two paths in one step. Raises OSError: EINVAL or ENOSYS where that is not possible."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        raise OSError(errno.ENOSYS, "this C library has no renameat2")
    if library.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one))
