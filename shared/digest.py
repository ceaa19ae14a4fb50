"""One hash for a folder of files, so that a submission can be named and checked by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def file_digest(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """Hex sha256 over the sorted `relative/path:sha256` lines of all files below `folder`.

    Raises FileNotFoundError if there is no such folder and ValueError if it holds no file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not files:
        raise ValueError(f"nothing to hash in {folder}")
    return digest_of({path.relative_to(folder).as_posix(): file_digest(path) for path in files})


def digest_of(files: Mapping[str, str]) -> str:
    """The digest of a folder with these files, `relative/path` -> hex sha256, wherever it is."""
    lines = [f"{path}:{files[path]}\n" for path in sorted(files, key=lambda path: path.split("/"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
