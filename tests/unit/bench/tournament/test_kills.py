"""Kills where a container is aimed at, and the memory that the kernel ends a worker for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from msgspec import Struct

from bench.tournament import play
from bench.tournament.container import children_of, kill_worker
from bench.tournament.kills import AIMS, Aim, Kill, Watch, run_and_kill
from bench.tournament.memory_group import GROUPS, in_bytes, memory_group
from bench.tournament.memory_taker import group_of, take_memory
from bench.tournament.mounts import Mounted, prepare
from shared.messages.encoding import encode
from shared.messages.runs import Phase, Progress
from shared.processes import start_time
from trainer_node.worker.crash import out_of_memory_kills

SECONDS = 3.0


class Script(Struct, frozen=True):
    """Runs a Python script in place of a container; it ends or is killed."""

    text: str

    def start(self, mounted: Mounted, profiles: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", self.text], stdout=log, cwd=mounted.submission.parent)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def processes(self, process: subprocess.Popen[bytes]) -> list[int]:
        return [process.pid, *children_of(process.pid)]


SLEEP = "import time; time.sleep(60)"
REPLACE = f"""
import os, time
from pathlib import Path
time.sleep(0.3)
os.mkdir(".staged-{{name}}")
{SLEEP}
"""
EXPORT = f"""
import subprocess, sys, threading, time
command = [sys.executable, "-c", "{SLEEP}", "trainer_node.engine.early_export"]
started = []
thread = threading.Thread(target=lambda: (started.append(subprocess.Popen(command)), time.sleep(2)))
thread.start()
thread.join()
started[0].kill()
"""


@pytest.fixture
def mounted(tmp_path: Path) -> Mounted:
    made = prepare(tmp_path, "instruct", "tiny", 10, 0.5)
    (made.runs / "auto").mkdir(parents=True)
    return made


def report(mounted: Mounted, phase: Phase, step: int) -> None:
    line = encode(Progress(task="t", slot="contest", phase=phase, step=step))
    with (mounted.runs / "auto" / "progress.jsonl").open("ab") as file:
        file.write(line + b"\n")


def test_a_bench_that_fails_leaves_nothing_running(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[subprocess.Popen[bytes]]()

    def broken(watch: Watch) -> int:
        started.append(watch.process)
        raise OSError("the disk is gone")

    monkeypatch.setattr(Watch, "step", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        run_and_kill(Script(SLEEP), mounted, "auto", SECONDS, Kill(Aim.TRAINING, 1))
    assert started[0].poll() is not None


def test_a_kill_waits_for_the_first_step(mounted: Mounted) -> None:
    report(mounted, Phase.TRAIN, 0)
    ended, killed = run_and_kill(Script(SLEEP), mounted, "auto", SECONDS, Kill(Aim.TRAINING, 0))
    assert ended.status is None
    assert ended.seconds >= SECONDS  # it never came: killed at the end of its time
    assert killed is not None
    assert killed.step == 0
    report(mounted, Phase.TRAIN, 12)
    ended, killed = run_and_kill(Script(SLEEP), mounted, "auto", SECONDS, Kill(Aim.TRAINING, 0, 1.0))
    assert 1.0 <= ended.seconds < SECONDS
    assert killed is not None
    assert (killed.step, killed.exporting, killed.replacing) == (12, False, False)


def test_a_kill_hits_a_replacement(mounted: Mounted) -> None:
    report(mounted, Phase.TRAIN, 12)
    script = Script(REPLACE.format(name=mounted.submission.name))
    ended, killed = run_and_kill(script, mounted, "auto", SECONDS, Kill(Aim.REPLACEMENT, 0))
    assert 0.3 <= ended.seconds < SECONDS
    assert killed is not None
    assert killed.replacing


def test_a_kill_hits_an_export_that_a_thread_started(mounted: Mounted) -> None:
    report(mounted, Phase.TRAIN, 12)
    _, killed = run_and_kill(Script(EXPORT), mounted, "auto", SECONDS, Kill(Aim.EARLY_EXPORT, 3))
    assert killed is not None
    assert killed.exporting


def test_the_workers_own_export_is_seen(mounted: Mounted) -> None:
    report(mounted, Phase.TRAIN, 12)
    report(mounted, Phase.EXPORT, 12)
    ended, killed = run_and_kill(Script(SLEEP), mounted, "auto", SECONDS, Kill(Aim.FINAL_EXPORT, 0))
    assert ended.seconds < SECONDS
    assert killed is not None
    assert (killed.step, killed.exporting) == (12, True)


def test_one_that_ends_by_itself_was_not_killed(mounted: Mounted) -> None:
    ended, killed = run_and_kill(Script("raise SystemExit(3)"), mounted, "auto", SECONDS, Kill(AIMS[0], 0))
    assert (ended.status, killed) == (3, None)


def test_every_aim_has_its_turn() -> None:
    assert set(AIMS) == set(Aim)


def test_kills_can_have_one_aim(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--kills-only", "--aims", "final export", "--replacement-kills", "0", "--faults"]
    monkeypatch.setattr(sys, "argv", ["tournament", *words])
    play.main()
    assert json.loads(capsys.readouterr().out)["kills"] == 0


def test_sizes_are_as_docker_has_them() -> None:
    assert (in_bytes("450m"), in_bytes("2g")) == (450 << 20, 2 << 30)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_group_is_found_in_either_version(tmp_path: Path) -> None:
    write(tmp_path / "proc/7/cgroup", "4:memory:/one\n3:cpu,cpuacct:/two\n0::/three\n")
    assert group_of(7, tmp_path) == tmp_path / "sys/fs/cgroup/memory/one"
    write(tmp_path / "proc/7/cgroup", "0::/podium/half\n")
    assert group_of(7, tmp_path) == tmp_path / "sys/fs/cgroup/podium/half"


@contextmanager
def victim(group: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", f"held = b'x' * (60 << 20); print(flush=True); {SLEEP}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            (group / "cgroup.procs").write_text(str(process.pid))
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"  # it is as large as a worker is
            yield process
        finally:
            process.kill()


def test_a_killed_worker_has_ended() -> None:
    """Else it would be taken for the next one, which then would never be killed."""
    held = "held = b'x' * (300 << 20)"  # its end takes the kernel a while
    with subprocess.Popen([sys.executable, "-c", f"{held}; print(flush=True); {SLEEP}"], stdout=-1) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        kill_worker(worker.pid)
        assert start_time(worker.pid) is None


def test_the_kernel_kills_a_worker_without_memory() -> None:
    if not os.access(GROUPS / "memory" if (GROUPS / "memory").is_dir() else GROUPS, os.W_OK):
        pytest.skip("control groups can't be made here")
    before = out_of_memory_kills()
    with memory_group("200m") as group, victim(group) as worker:
        began = time.monotonic()
        take_memory(worker.pid)
        assert worker.wait() == -9
        assert time.monotonic() - began < 60.0
        counted = "memory.oom_control" if (group / "memory.oom_control").exists() else "memory.events"
        assert "oom_kill 1" in (group / counted).read_text()
    assert out_of_memory_kills() >= before
    assert not group.exists()
