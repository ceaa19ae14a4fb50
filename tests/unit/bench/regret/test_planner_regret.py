"""Regret of the planner's choice, from grids and submissions whose losses are known."""

from pathlib import Path

import msgspec
import pytest

from bench.arena.standings import Entry
from bench.arena.task import Task
from bench.regret.grid import ARMS, BATCHES, RATES, Point, PointResult, points
from bench.regret.planner_regret import GridEntry, GridKey, lowest, read_grids, regrets, summary

KEY = GridKey("wordnet", "llama", 150, 0)
SHORT, LONG = Point("dense", 3.0, 16, 2.0), Point("dense", 1.0, 16, 8.0)


def result(point: Point, *losses: float) -> PointResult:
    return PointResult(point, list(losses), 1.0)


def entries(task: Task, auto: float | None, once: float | None = 3.0) -> list[Entry]:
    return [Entry(task, name, loss, [], 1, 1.0) for name, loss in (("auto", auto), ("auto_once", once))]


def test_the_grid_is_the_product_of_its_sides_without_repeats() -> None:
    grid = points((1.0, 2.0))
    assert len(set(grid)) == len(grid) == 2 * len(ARMS) * len(RATES) * len(BATCHES)
    assert {point.epochs for point in grid} == {1.0, 2.0}


def test_the_lowest_point_is_by_the_mean_and_one_that_diverged_is_left_out() -> None:
    point, loss, _ = lowest([result(SHORT, 2.0, 2.0), result(LONG, 1.0, 2.0), result(SHORT)])
    assert (point, loss) == (LONG, 1.5)


def test_the_fair_loss_is_of_points_chosen_by_the_other_rows() -> None:
    # Each is lower on one half: chosen by that half it is scored on the other.
    _, loss, fair = lowest([result(SHORT, 1.0, 3.0, 1.0, 3.0), result(LONG, 3.0, 2.0, 3.0, 2.0)])
    assert loss == 2.0
    assert fair == 3.0
    one = lowest([result(SHORT, 1.0, 2.0, 3.0)])
    assert one[1] == pytest.approx(one[2])


def test_only_points_within_the_budget_count() -> None:
    grids = {KEY: {SHORT: result(SHORT, 2.5, 2.5), LONG: result(LONG, 2.0, 2.0)}}
    played = [*entries(KEY.task(4.0), 2.4), *entries(KEY.task(16.0), 2.1)]
    read = [msgspec.json.decode(msgspec.json.encode(entry), type=Entry) for entry in played]
    found = regrets(read, grids, [SHORT, LONG])
    assert [one.best for one in found] == [SHORT, LONG]
    assert [one.of("auto") for one in found] == pytest.approx([-0.1, 0.1])
    figures = summary(found, 2, 2)
    assert figures["regret"]["auto"] == {"median": 0.0, "worst": 0.1, "fair_median": 0.0}
    assert figures["regret"]["auto_once"]["worst"] == 1.0


def test_a_task_without_a_submission_is_counted_as_invalid() -> None:
    grids = {KEY: {SHORT: result(SHORT, 2.5, 2.5)}}
    found = regrets([*entries(KEY.task(4.0), None), *entries(KEY.task(5.0), 2.6)], grids, [SHORT])
    assert len(found) == 1
    assert summary(found, 2, 1)["invalid"] == 1
    assert summary([], 2, 1)["regret"] == {}


def test_grids_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "grids.jsonl"
    assert read_grids(path) == {}
    for one in (result(SHORT, 2.0), result(LONG, 3.0)):
        with path.open("ab") as file:
            file.write(msgspec.json.encode(GridEntry(KEY, one)) + b"\n")
    assert read_grids(path) == {KEY: {SHORT: result(SHORT, 2.0), LONG: result(LONG, 3.0)}}
