"""Read a file whenever it changes: API tokens, stakes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

Content = TypeVar("Content")


class WatchedFile(Generic[Content]):
    """A file that others replace; `read` makes its content of the path and its status."""

    def __init__(self, path: Path, read: Callable[[Path, os.stat_result], Content]) -> None:
        self.path = path
        self._read = read
        self._stamp: tuple[int, ...] | None = None

    def read_if_changed(self) -> Content | None:
        """Return the content if the file is not the one read last, else None. Blocks.

        Raises OSError, and what `read` raises; then the next call reads it again.
        """
        status = self.path.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp == self._stamp:
            return None
        content = self._read(self.path, status)
        self._stamp = stamp
        return content

    async def poll(self) -> Content | None:
        """Call `read_if_changed` in a thread: the disk may be slow."""
        return await asyncio.to_thread(self.read_if_changed)
