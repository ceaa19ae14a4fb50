"""The end of the worker that `podium train` started."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import NoReturn, cast

import pytest

from podium.__main__ import parser
from podium.commands import train
from podium.commands.train import _progress, end, finished, job_from
from podium.training_config import TrainConfig
from shared.errors import PodiumError
from shared.messages.encoding import encode
from shared.messages.runs import Outcome, OutcomeStatus, Phase, Progress

DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(120)"
POLITE = DEAF.replace("signal.SIG_IGN", "lambda *_: exit(7)")


@pytest.fixture
def ctrl_c_soon() -> Iterator[Callable[[], object]]:
    """A function after which a Ctrl-C comes soon."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda: signal.setitimer(signal.ITIMER_REAL, 0.3)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def started(code: str) -> subprocess.Popen[bytes]:
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"up\n"
    worker.stdout.close()
    return worker


@pytest.mark.timeout(0)  # its alarm is this test's
def test_a_second_ctrl_c_ends_the_worker_too(ctrl_c_soon: Callable[[], object]) -> None:
    worker = started(DEAF)
    ctrl_c_soon()
    end(worker)
    assert worker.returncode == -signal.SIGKILL


def test_one_that_stops_is_left_to_it() -> None:
    worker = started(POLITE)
    end(worker)
    assert worker.returncode == 7
    end(worker)  # it is over: nothing is signalled


@pytest.mark.parametrize(("given", "rows"), [([], None), (["--preview"], 5), (["--preview", "2"], 2)])
def test_a_preview_has_five_rows_unless_it_is_told(given: list[str], rows: int | None) -> None:
    assert parser("train").parse_args(["train", "examples/offer.json", *given]).preview == rows


def test_a_line_that_was_cut_does_not_end_the_display(tmp_path: Path) -> None:
    path, whole = tmp_path / "progress.jsonl", Progress(task="t", slot="a", phase=Phase.TRAIN)
    path.write_bytes(b'{"task":"t"\n' + encode(whole) + b"\n")
    with subprocess.Popen([sys.executable, "-c", ""]) as worker:
        worker.wait()
        assert list(_progress(path, 0, worker)) == [whole]


READY = Outcome(status=OutcomeStatus.READY, digest="d", export="export")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (encode(READY), READY),
        (encode(Outcome(status=OutcomeStatus.STOPPED)), None),
        (None, None),
        (b"", None),
        (b"\0" * 80, None),
        (b'{"status": "ready", "digest": "\xff"}', None),
        (b'{"more": ' + b"[" * 100_000, None),
    ],
)
def test_a_run_is_finished_by_a_whole_outcome_that_is_ready(
    content: bytes | None, found: Outcome | None, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "outcome.json").write_bytes(content)
    assert finished(tmp_path) == found


def test_an_outcome_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").mkdir()
    with pytest.raises(PodiumError, match=r"outcome\.json can't be read: Is a directory"):
        finished(tmp_path)


def test_a_job_that_could_not_be_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut one would be refused at each later start in this folder."""

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("local_model", "local_data"):
        monkeypatch.setattr(train, name, lambda *_: "there")
    monkeypatch.setattr(train, "worker_job_of", lambda *_: READY)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        job_from(cast(TrainConfig, SimpleNamespace(model="m", dataset="d", out=str(tmp_path))))
    assert not (tmp_path / "job.json").exists()
