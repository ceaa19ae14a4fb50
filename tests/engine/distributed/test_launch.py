"""The parent of several ranks: what it makes of their ends. The ranks are shells here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer_node.engine.distributed.launch import AGAIN, GRACE_S, Ranks, inherited, rank_of


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _run(rank_0: str, rank_1: str, stop_file: Path | None = None) -> tuple[int, float]:
    """Exit status and seconds of two ranks that run these shell commands."""
    began = time.monotonic()
    script = f'if [ "$RANK" = 0 ]; then {rank_0}; else {rank_1}; fi'
    return Ranks(["sh", "-c", script], 2, stop_file).run(), time.monotonic() - began


def test_rank_0_says_how_it_ended() -> None:
    assert _run("exit 0", "exit 0")[0] == 0
    assert _run("exit 1", "exec sleep 60")[0] == 1
    assert _run("sleep .2; exit 0", "exit 0")[0] == 0  # done earlier


def test_who_stays_after_rank_0_is_ended() -> None:
    status, seconds = _run("exit 0", "exec sleep 60")
    assert status == 0
    assert seconds < 30.0


def test_a_killed_rank_ends_all_at_once() -> None:
    status, seconds = _run("exec sleep 60", "kill -9 $$")
    assert status == 1
    assert seconds < GRACE_S
    assert _run("kill -9 $$", "exec sleep 60")[0] == 128 + signal.SIGKILL


def test_a_failing_rank_leaves_rank_0_time_to_write_the_outcome(tmp_path: Path) -> None:
    status, seconds = _run(f"sleep .3; touch {tmp_path}/word; exit 1", "exit 1")
    assert status == 1
    assert (tmp_path / "word").exists()
    assert seconds < GRACE_S


def test_all_start_again_when_one_ran_out_of_memory(tmp_path: Path) -> None:
    mark = tmp_path / "smaller"
    status, seconds = _run(
        f"test -e {mark} || exec sleep 60", f"test -e {mark} || {{ touch {mark}; exit {AGAIN}; }}"
    )
    assert status == 0
    assert seconds < 30.0
    # Rank 0 may have lost its peer, and ended, before the peer has.
    mark.unlink()
    late = f"test -e {mark} || {{ touch {mark}; sleep .3; exit {AGAIN}; }}"
    assert _run(f"test -e {mark}.0 || {{ touch {mark}.0; exit 1; }}", late)[0] == 0


def test_memory_that_never_suffices_is_an_end() -> None:
    assert _run("exec sleep 60", f"exit {AGAIN}")[0] == AGAIN


def test_sigterm_reaches_rank_0_alone(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    first = f"trap 'exit 7' TERM; touch {ready}; while :; do sleep .05; done"

    def terminate() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=terminate)
    killer.start()
    status, _ = _run(first, "exec sleep 60", tmp_path / "stop")
    killer.join()
    assert status == 7
    assert (tmp_path / "stop").exists()  # for ranks that each train something else


def test_a_stop_file_that_can_not_be_written_is_no_error(tmp_path: Path) -> None:
    ranks = Ranks(["sh", "-c", "exec sleep 60"], 1, tmp_path / "missing" / "stop")
    ranks._start()
    ranks._stop(signal.SIGTERM, None)
    assert ranks._watch() == 128 + signal.SIGTERM


def test_every_rank_inherits_what_the_parent_was_handed(tmp_path: Path) -> None:
    with (tmp_path / "slot.lock").open("w") as lock:
        code = "from trainer_node.engine.distributed.launch import inherited; print(inherited())"
        done = subprocess.run(
            [sys.executable, "-c", code],
            pass_fds=(lock.fileno(),),
            capture_output=True,
            check=True,
            text=True,
        )
        assert done.stdout.strip() == f"[{lock.fileno()}]"
        assert lock.fileno() not in inherited()
        os.set_inheritable(lock.fileno(), True)
        assert lock.fileno() in inherited()


def test_a_rank_is_known_by_torchrun_s_names() -> None:
    assert rank_of({"RANK": "3", "WORLD_SIZE": "4"}) == 3
    assert rank_of({"RANK": "3"}) is None
    assert rank_of({}) is None
