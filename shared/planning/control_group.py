"""Memory limits of this process's control groups: a container or unit may use less than the machine has."""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct

GROUPS = Path("sys/fs/cgroup")


class MemoryLimit(Struct, frozen=True):
    """A limit and how much of it is used, without files that can be dropped from memory at once."""

    limit: int
    used: int


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """Return the limits that hold for this process: of its own group and of every group around it."""
    found = [*_of_version_2(root), *_of_version_1(root)]
    return [limit for limit in found if limit is not None]


def _of_version_2(root: Path) -> list[MemoryLimit | None]:
    own = _own_path(root, "")
    return [
        _read(folder / "memory.max", folder / "memory.current", folder / "memory.stat", "inactive_file")
        for folder in _upwards(root / GROUPS, own)
    ]


def _of_version_1(root: Path) -> list[MemoryLimit | None]:
    own = _own_path(root, "memory")
    return [
        _read(
            folder / "memory.limit_in_bytes",
            folder / "memory.usage_in_bytes",
            folder / "memory.stat",
            "total_inactive_file",
        )
        for folder in _upwards(root / GROUPS / "memory", own)
    ]


def _own_path(root: Path, controller: str) -> str:
    """Return this process's group below the controller's folder; inside a container that is its root."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.strip("/")
    return ""


def _upwards(top: Path, own: str) -> list[Path]:
    """Return the group's folder and all above it; a path that is not mounted here is left out."""
    folders, folder = [], top / own
    while folder != top:
        folders.append(folder)
        folder = folder.parent
    return [one for one in (*folders, top) if one.is_dir()]


def _read(limit: Path, used: Path, stat: Path, droppable: str) -> MemoryLimit | None:
    try:
        most, now, details = limit.read_text().strip(), int(used.read_text()), stat.read_text()
    except (OSError, ValueError):  # no such controller: the root group has no limit
        return None
    if not most.isdigit():  # "max"
        return None
    match = re.search(rf"^{droppable} (\d+)$", details, re.MULTILINE)
    return MemoryLimit(int(most), max(0, now - (int(match[1]) if match else 0)))
