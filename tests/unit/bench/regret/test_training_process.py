"""A training process of a bench: its results come one by one, and its failure is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import Struct

from bench.arena.task import Task
from bench.regret import training_process
from bench.regret.training_process import results_of
from shared.messages.hardware import Hardware

TRAINER = """
import json, sys
from pathlib import Path
for number in json.loads((Path(sys.argv[1]).parent / "points.json").read_text()):
    print("a library's word")
    if number["at"] < 0:
        raise SystemExit("the device is gone")
    print(json.dumps({"point": number, "loss": number["at"] / 2}))
"""


class Place(Struct, frozen=True):
    at: int


class Found(Struct, frozen=True):
    point: Place
    loss: float


@pytest.fixture(autouse=True)
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `trainer` in the folder that the process is started in."""

    def write_job(task: Task, profile: str, cache: Path, folder: Path, hardware: Hardware) -> Path:
        return folder / "job.json"

    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(training_process, "ROOT", tmp_path)
    monkeypatch.setattr(training_process, "write_job", write_job)


def results(*places: int) -> Iterator[Found]:
    wanted = [Place(place) for place in places]
    return results_of("trainer", Task("s", "m", 1, 1.0, 0), "point", wanted, Found, Path())


def test_what_is_wanted_comes_back_without_what_libraries_print() -> None:
    assert list(results(4, 6)) == [Found(Place(4), 2.0), Found(Place(6), 3.0)]


def test_a_process_that_fails_has_given_its_results_before() -> None:
    found = results(4, -1)
    assert next(found) == Found(Place(4), 2.0)
    with pytest.raises(RuntimeError, match=r"trainer ended early on (.|\n)*the device is gone"):
        next(found)
