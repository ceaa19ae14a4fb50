"""A check of the GPU suite is answered whatever becomes of its process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.gpu.check import Finding, Setting, Skip, run_check
from bench.gpu.machine import environment
from trainer_node.worker.environment import worker_environment


def test_what_a_check_finds_is_its_answer() -> None:
    answer = run_check(lambda setting: Finding({"dry": setting.dry}), dry=True, limit_s=20.0)
    assert (answer.status, answer.figures, answer.faults) == ("ok", {"dry": True}, [])


def test_a_check_has_the_environment_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    wanted = worker_environment(os.environ, 1, None, temporary=Path("tmp"))
    assert wanted["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    found = run_check(lambda setting: Finding(dict(os.environ)), dry=True, limit_s=20.0).figures
    own = {"TMPDIR", "TORCHINDUCTOR_CACHE_DIR"}  # in the check's folder
    assert {name: found[name] for name in set(found) - own} == {
        name: wanted[name] for name in set(wanted) - own
    }
    assert Path(found["TMPDIR"]).parent == Path(found["TORCHINDUCTOR_CACHE_DIR"]).parent
    assert run_check(environment, dry=True, limit_s=60.0).figures["allocator"] == {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"
    }


def test_a_fault_keeps_its_figures() -> None:
    answer = run_check(lambda setting: Finding({"error": 0.3}, ["too large"]), dry=True, limit_s=20.0)
    assert (answer.status, answer.figures, answer.faults) == ("failed", {"error": 0.3}, ["too large"])


def test_an_exception_is_a_fault_and_says_where() -> None:
    def check(setting: Setting) -> Finding:
        raise ValueError("no such thing")

    answer = run_check(check, dry=True, limit_s=20.0)
    assert (answer.status, answer.faults) == ("failed", ["ValueError: no such thing"])
    assert any("raise ValueError" in line for line in answer.figures["where"])


def test_what_is_missing_here_is_skipped() -> None:
    def check(setting: Setting) -> Finding:
        raise Skip("one GPU only")

    answer = run_check(check, dry=True, limit_s=20.0)
    assert (answer.status, answer.faults) == ("skipped", ["one GPU only"])


def test_a_process_that_dies_is_a_fault() -> None:
    answer = run_check(lambda setting: os._exit(7), dry=True, limit_s=20.0)
    assert (answer.status, answer.faults) == ("failed", ["it ended with exit status 7"])


def test_a_check_and_what_it_started_end_at_the_limit(tmp_path: Path) -> None:
    place = tmp_path / "child"

    def check(setting: Setting) -> Finding:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        place.write_text(str(child.pid))
        time.sleep(100)
        return Finding({})

    answer = run_check(check, dry=True, limit_s=2.0)
    assert (answer.status, answer.faults) == ("failed", ["no answer in 2 s"])
    assert answer.seconds < 20
    until = time.monotonic() + 10
    while _runs(int(place.read_text())) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(int(place.read_text()))


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
