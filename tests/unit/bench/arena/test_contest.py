"""The arena's figures, from entries whose winner is known."""

from pathlib import Path

import msgspec
import pytest

from bench.arena.contest import read_entries
from bench.arena.standings import Entry, by_task, print_table, summary
from bench.arena.task import Task

TASKS = [Task("wordnet", "llama", 100, 2.0, seed) for seed in range(3)]
RIVALS = ("rival", "other")


def entry(task: Task, profile: str, loss: float | None) -> Entry:
    losses = [] if loss is None else [loss + 0.001 * row for row in range(50)]
    return Entry(task, profile, loss, losses, 10, 2.0)


def figures(champion: list[float | None], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    entries = [entry(task, "auto", loss) for task, loss in zip(TASKS, champion, strict=True)]
    entries += [entry(task, "rival", 2.0) for task in TASKS] + [entry(task, "other", 3.0) for task in TASKS]
    found = by_task(entries)
    print_table(found, ("auto", *RIVALS))
    assert "wordnet on llama" in capsys.readouterr().out
    return summary(found, "auto", RIVALS)


def test_places_and_margins(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures([1.5, 2.5, 1.0], capsys)
    assert (found["tasks"], found["first_place_rate"], found["top2_rate"]) == (3, 0.667, 1.0)
    assert (found["margin_vs_best"], found["worst_margin"]) == (0.5, -0.5)
    against = found["against"]
    assert isinstance(against, dict)
    assert against["rival"]["group"] == 0.667
    assert against["other"] == {"group": 1.0, "knockout": 1.0, "boss": 1.0, "median_margin": 1.5}


def test_an_invalid_submission_is_last_and_a_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures([1.5, None, 1.0], capsys)
    assert (found["first_place_rate"], found["top2_rate"], found["penalty_rate"]) == (0.667, 0.667, 0.333)


def test_results_are_read_again(tmp_path: Path) -> None:
    path, one = tmp_path / "results.jsonl", entry(TASKS[0], "auto", 1.5)
    assert read_entries(path) == {}
    path.write_bytes(msgspec.json.encode(one) + b"\n")
    assert read_entries(path) == {(TASKS[0], "auto"): one}
