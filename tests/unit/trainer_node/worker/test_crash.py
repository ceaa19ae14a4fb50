"""What a worker without a last word died of."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.messages.runs import ErrorCode
from trainer_node.worker.crash import Failure, explain, out_of_memory_kills

ROOM = 1 << 30
MANNER = "the worker ended with exit code 1"


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("terminate called: CUDA error: device-side assert triggered", ErrorCode.DEVICE),
        ("torch.AcceleratorError: uncorrectable ECC error", ErrorCode.DEVICE),
        ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", ErrorCode.OUT_OF_MEMORY),
        ("RuntimeError: CUDA error: out of memory", ErrorCode.OUT_OF_MEMORY),
        ("terminate called after throwing an instance of 'std::bad_alloc'", ErrorCode.OUT_OF_MEMORY),
        ("memory allocation of 9000000000 bytes failed", ErrorCode.OUT_OF_MEMORY),
        ("OSError: [Errno 28] No space left on device", ErrorCode.DISK_FULL),
        ("RuntimeError: something else", ErrorCode.INTERNAL),
        (None, ErrorCode.INTERNAL),
    ],
)
def test_its_last_line_tells(said: str | None, code: ErrorCode) -> None:
    failure = explain(MANNER, said, out_of_memory=False, free_bytes=ROOM)
    assert failure == Failure(f"{MANNER}: {said or 'its log is empty'}", code)


def test_what_the_kernel_counted_weighs_more_than_words() -> None:
    failure = explain("killed", "OSError: No space left on device", out_of_memory=True, free_bytes=0)
    assert failure.code is ErrorCode.OUT_OF_MEMORY


def test_on_a_full_disk_there_are_no_words() -> None:
    failure = explain(MANNER, None, out_of_memory=False, free_bytes=100)
    assert failure.code is ErrorCode.DISK_FULL
    assert "No space left on device" in failure.text


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_narrowest_counter_is_read(tmp_path: Path) -> None:
    assert out_of_memory_kills(tmp_path) == 0
    write(tmp_path / "proc/vmstat", "pgfault 9\noom_kill 7\n")
    assert out_of_memory_kills(tmp_path) == 7
    write(tmp_path / "sys/fs/cgroup/memory/half/memory.oom_control", "under_oom 0\noom_kill 5\n")
    write(tmp_path / "proc/self/cgroup", "4:memory:/half\n0::/podium/half\n")
    assert out_of_memory_kills(tmp_path) == 5
    write(tmp_path / "sys/fs/cgroup/podium/half/memory.events", "oom 3\noom_kill 2\n")
    assert out_of_memory_kills(tmp_path) == 2


def test_this_machine_has_a_counter() -> None:
    assert out_of_memory_kills() >= 0
