"""The end of the worker that `podium train` started."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from podium.__main__ import parser
from podium.commands.train import _progress, end
from shared.messages.encoding import encode
from shared.messages.runs import Phase, Progress

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
