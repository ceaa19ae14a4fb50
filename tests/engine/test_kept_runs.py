"""The benches of real runs keep the folders of what went wrong, though the one they work in is temporary."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from bench.deadline import decisions, real_runs
from bench.harness import tiny_jobs
from bench.reliability import deliveries, resume


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def unequal_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that only write a log; each ends otherwise than the one before."""

    def sleeper(job: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)

    def finish(job: Path) -> None:
        (job.parent / "worker.log").write_text(f"the log of {job.parent.name}")
        (job.parent / "progress.jsonl").write_text("")

    monkeypatch.setattr(tiny_jobs, "start", sleeper)
    monkeypatch.setattr(resume, "finish", finish)
    monkeypatch.setattr(tiny_jobs, "weights_of", lambda job: iter([(job.parent.name, b"")]))
    monkeypatch.setattr(decisions, "decided", lambda folder: ([], None))


def deliver(folder: Path) -> int:
    return deliveries.kill_real(1, 0, folder)["differ"]


def disturb(folder: Path) -> int:
    report = resume.Report()
    resume.disturb(
        "dense", 1, folder, tiny_jobs.write_rows(folder.parent / "rows.json", 8), Random(0), report
    )
    return report.not_bit_equal


@pytest.mark.usefixtures("unequal_runs")
@pytest.mark.parametrize("bench", [deliver, disturb])
def test_a_run_that_ends_otherwise_is_kept_with_the_undisturbed_one(
    bench: Callable[[Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path / "work") == 1
    found = re.search(r"NOT EQUAL, kept in (\S+)", capsys.readouterr().out)
    assert found is not None
    logs = sorted(path.read_text() for path in Path(found[1]).rglob("worker.log"))
    assert [re.sub(r"-\d", "", log) for log in logs] == ["the log of calm", "the log of rough"]


def test_a_run_that_does_not_finish_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(job: Path) -> subprocess.Popen[bytes]:
        with (job.parent / "worker.log").open("wb") as log:
            return subprocess.Popen([sys.executable, "-c", "print('why')"], stdout=log)

    monkeypatch.setattr(tiny_jobs, "start", failing)
    job = tiny_jobs.write_job(tmp_path / "rough-1", tmp_path / "rows.json")
    with pytest.raises(AssertionError, match="no outcome") as caught:
        resume.finish(job)
    kept = Path(str(caught.value).partition("kept in ")[2].splitlines()[0])
    assert (kept / "rough-1" / "worker.log").read_text() == "why\n"


def test_a_run_without_a_submission_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def live(folder: Path, data: Path, seed: int) -> float | None:
        tiny_jobs.write_job(folder, data)
        return None if seed else 0.0

    monkeypatch.setattr(real_runs, "live", live)
    assert real_runs.runs(2, 0, tmp_path, tmp_path / "rows.json")["without_submission"] == 1
    kept = Path(capsys.readouterr().out.partition("kept in ")[2].splitlines()[0])
    assert [path.name for path in kept.iterdir()] == ["1"]
