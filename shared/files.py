"""Write files that survive a crash, and hash files and folders by their content."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

PRIVATE: Final = 0o600


def write_atomically(path: Path, content: bytes, mode: int | None = None) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new, never a part.

    With a `mode` the file has exactly that, from the first byte on. Raises OSError, for instance if the disk
    is full; the old content then stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of an earlier process with this id, with whatever mode
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    with os.fdopen(descriptor, "wb") as file:
        if mode is not None:
            os.fchmod(descriptor, mode)  # whatever the umask
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def open_private(path: Path, *, empty: bool) -> BinaryIO:
    """Open a file for reading and writing that nobody else may read, whatever its mode or the umask was.

    `empty` creates it, or removes its content; else it must exist. Raises OSError.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if empty else 0)
    descriptor = os.open(path, flags, PRIVATE)
    try:
        os.fchmod(descriptor, PRIVATE)
        return os.fdopen(descriptor, "r+b")
    except BaseException:
        os.close(descriptor)
        raise


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all bytes: one write may take only a part of them, without an error. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def append_lines(descriptor: int, lines: bytes) -> None:
    """Append whole lines to a file that is open for reading and appending.

    They begin on a new line, whatever a kill or a full disk cut before. Raises OSError; a part of them may
    then be there.
    """
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        lines = b"\n" + lines
    write_all(descriptor, lines)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's new and renamed entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: OSError) -> bool:
    """Return whether an error says that a disk or a quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def file_digest(path: Path) -> str:
    """Return the hex sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder. Raises OSError, also for a part of it that can't be read."""

    def refuse(error: OSError) -> None:  # rglob leaves out what it may not read, as if it were not there
        raise error

    for place, _, names in os.walk(folder, onerror=refuse):
        yield from (path for name in names if (path := Path(place, name)).is_file())


def folder_digest(folder: Path) -> str:
    """Return the hex sha256 over the sorted `relative/path:sha256` lines of all files below `folder`.

    Raises OSError, FileNotFoundError if there is no such folder, and ValueError if it holds no file.
    """
    files = list(files_in(folder))
    if not files:
        raise ValueError(f"nothing to hash in {folder}")
    return digest_of({path.relative_to(folder).as_posix(): file_digest(path) for path in files})


def digest_of(files: Mapping[str, str]) -> str:
    """Return the digest of a folder with these files, `relative/path` -> hex sha256, wherever it is."""
    lines = [f"{path}:{files[path]}\n" for path in sorted(files, key=lambda path: path.split("/"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
