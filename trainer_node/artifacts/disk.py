"""The artifact store on disk: one submission per task under one fixed name; the first rename wins."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from shared.errors import PodiumError
from shared.files import files_in, folder_digest, sync


class DamagedExportError(PodiumError):
    """An export is not what its worker said it is."""


def submission(artifacts: Path, task: str) -> Path:
    """Return where a task's one submission is."""
    return artifacts / task / "submission"


def is_stored(artifacts: Path, task: str) -> bool:
    """Return whether the task's submission is there. It came by one rename of a synced folder: complete.

    Raises OSError if that can't be read.
    """
    try:
        return any(files_in(submission(artifacts, task)))
    except (FileNotFoundError, NotADirectoryError):
        return False


def stored_digest(artifacts: Path, task: str) -> str:
    """Digest of the stored submission, read back from disk (seconds for large ones: use a thread)."""
    return folder_digest(submission(artifacts, task))


def store(
    artifacts: Path, task: str, export: Path, digest: str, *, node: str, must_hold: Callable[[], None]
) -> str:
    """Put an export under the task's submission name unless something is there; return what is there now.

    The digest returned is another than `digest` if another holder of the task was first. `must_hold` is
    called right before the rename and raises if this node may no longer act for the slot. Raises
    DamagedExportError if the export doesn't have `digest`, and OSError. Blocks: use a thread.
    """
    final = submission(artifacts, task)
    if not is_stored(artifacts, task):
        incoming = final.with_name(f".incoming-{node}")
        shutil.rmtree(incoming, ignore_errors=True)  # left by a kill of this node
        try:
            _copy(export, incoming)
            if (found := folder_digest(incoming)) != digest:
                raise DamagedExportError(f"the export has digest {found}, its worker said {digest}")
            must_hold()
            _rename(incoming, final)
        except (FileNotFoundError, ValueError) as error:
            raise DamagedExportError(f"the export can't be read: {error}") from error
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
    return stored_digest(artifacts, task)


def _rename(incoming: Path, final: Path) -> None:
    try:
        incoming.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        sync(final.parent)


def _copy(source: Path, target: Path) -> None:
    """Link every file (an export never changes), or copy it to another file system; all synced."""
    if not source.is_dir():
        raise FileNotFoundError(f"no such folder: {source}")
    target.mkdir(parents=True)
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), copy)
        except OSError:
            shutil.copyfile(path, copy)
        sync(copy)
    for folder in (*(path for path in target.rglob("*") if path.is_dir()), target, target.parent):
        sync(folder)
    sync(target.parent.parent)
