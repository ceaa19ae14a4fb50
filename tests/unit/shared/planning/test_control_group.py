"""Memory limits of containers and units."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.planning import hardware
from shared.planning.control_group import MemoryLimit, memory_limits

GIB = 2**30


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")


def group(folder: Path, limit: str, used: int, cached: int = 0) -> None:
    stat = f"anon 5\ninactive_file {cached}"
    write(folder, {"memory.max": limit, "memory.current": str(used), "memory.stat": stat})


def test_every_group_around_the_process_counts(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", {"cgroup": "0::/podium.slice/node-a.service"})
    groups = tmp_path / "sys/fs/cgroup"
    write(groups, {"cgroup.controllers": "memory"})  # the root group has no limit
    group(groups / "podium.slice", str(64 * GIB), 20 * GIB, 8 * GIB)
    group(groups / "podium.slice/node-a.service", "max", 2 * GIB)
    assert memory_limits(tmp_path) == [MemoryLimit(64 * GIB, 12 * GIB)]


def test_inside_a_container_the_group_is_the_root(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", {"cgroup": "0::/../../elsewhere"})
    group(tmp_path / "sys/fs/cgroup", str(8 * GIB), GIB)
    assert MemoryLimit(8 * GIB, GIB) in memory_limits(tmp_path)


def test_version_1(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", {"cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/1a2b"})
    files = {"memory.limit_in_bytes": str(4 * GIB), "memory.usage_in_bytes": str(3 * GIB)}
    write(tmp_path / "sys/fs/cgroup/memory", {**files, "memory.stat": f"total_inactive_file {GIB}"})
    assert memory_limits(tmp_path) == [MemoryLimit(4 * GIB, 2 * GIB)]


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_limits(tmp_path) == []


def test_a_limit_counts_as_the_machine_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "memory_limits", lambda: [])
    total, _ = hardware.machine_memory()
    monkeypatch.setattr(hardware, "memory_limits", lambda: [MemoryLimit(total // 4, total // 4 - 1000)])
    assert hardware.machine_memory() == (total // 4, 1000)
    monkeypatch.setattr(hardware, "memory_limits", lambda: [MemoryLimit(2 * total, 0)])
    assert hardware.machine_memory()[0] == total


@pytest.mark.parametrize(
    ("limit", "own", "share"),
    [
        (None, False, 0.5),
        (None, True, 0.5),  # no limit
        (0.45, True, 1.0),  # the units': it was halved once more
        (0.45, False, 0.5),  # two slots share it
        (0.8, True, 0.5 / 0.8),  # two such slots have no more than the machine
    ],
)
def test_a_limit_is_halved_only_if_slots_share_it(
    limit: float | None, own: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "memory_limits", lambda: [])
    whole, _ = hardware.machine_memory()
    most = whole if limit is None else int(limit * whole)
    monkeypatch.setattr(hardware, "memory_limits", lambda: [] if limit is None else [MemoryLimit(most, 0)])
    assert hardware.memory_share(own_limit=own) == pytest.approx(share)
