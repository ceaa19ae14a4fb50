"""The arena's runs, and its figures from entries whose winner is known."""

import argparse
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.arena import arena
from bench.arena.arena import play, read_entries, run, said, tasks_of
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


def test_results_of_earlier_versions_are_of_instruct_tasks(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    task = '{"source":"wordnet","model":"llama","rows":100,"epochs":2.0,"seed":0,"damage":"noise"}'
    path.write_text(
        f'{{"task":{task},"profile":"auto","loss":1.5,"losses":[1.5],"steps":9,"epochs":2.0,"error":""}}\n'
    )
    old = Task("wordnet", "llama", 100, 2.0, 0, "noise")
    assert read_entries(path) == {(old, "auto"): Entry(old, "auto", 1.5, [1.5], 9, 2.0)}


def test_only_tasks_with_a_divergence_have_coefficients() -> None:
    options = argparse.Namespace(
        sources=["wordnet"],
        models=["llama"],
        rows=[100],
        budgets=[2.0],
        first_seed=3,
        seeds=1,
        damage=[None],
        kind=["instruct", "kl"],
        kl_coef=[0.3, 1.0],
    )
    assert [str(task) for task in tasks_of(options)] == [
        "wordnet on llama, 100 rows, 2 epochs, seed 3",
        "wordnet (kl 0.3) on llama, 100 rows, 2 epochs, seed 3",
        "wordnet (kl 1) on llama, 100 rows, 2 epochs, seed 3",
    ]


def test_the_base_models_loss_is_shown_where_it_was_measured() -> None:
    bare = entry(TASKS[0], "auto", 1.5)
    assert said(bare) == "1.5000"
    assert said(msgspec.structs.replace(bare, base_loss=2.25)) == "1.5000 (base 2.2500)"


def test_the_table_has_the_base_models_loss_where_it_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    measured = msgspec.structs.replace(entry(TASKS[0], "auto", 1.5), base_loss=2.25)
    print_table(by_task([measured, entry(TASKS[1], "auto", 1.5)]), ("auto",))
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.split()[-2:] == ["2.2500", "1.5000*"]
    assert "2.2500" not in second


def test_a_run_that_hangs_is_an_entry_without_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "write_job", lambda *_: tmp_path / "job.json")
    monkeypatch.setattr(arena, "RUN_S", 0.01)
    found = run(TASKS[0], "auto", tmp_path)
    assert (found.loss, found.error) == (None, "not done within 0.01 s")


def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: Any) -> list[Entry]:
    monkeypatch.setattr(arena, "model_folder", lambda *_: tmp_path)
    monkeypatch.setattr(arena, "run", by)
    return play(TASKS, ("auto",), tmp_path, tmp_path / "results.jsonl", workers=1)


def test_why_a_run_failed_is_shown_as_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = iter(["Traceback\nValueError: odd\n", "", ""])

    def fails(task: Task, profile: str, *_: object) -> Entry:
        return Entry(task, profile, None, [], 0, 0.0, next(errors))

    assert [each.loss for each in played(tmp_path, monkeypatch, fails)] == [None] * 3
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(": auto ")[2] for line in lines) == ["ValueError: odd", "failed", "failed"]


def test_an_error_of_the_arena_itself_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def breaks(task: Task, *_: object) -> Entry:
        begun.append(task)
        time.sleep(0.5)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        played(tmp_path, monkeypatch, breaks)
    assert len(begun) < len(TASKS)
