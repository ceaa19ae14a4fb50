"""Points of the arena's grid: each is trained from the base model's weights to its end, and scored."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.arena.contestant import test_rows as rows_to_score
from bench.arena.models import MODELS, build
from bench.regret import grid
from bench.regret.grid import Point
from shared.messages.runs import decode_worker_job
from shared.planning.hardware import parse_hardware
from shared.planning.model_shape import shape_from_config
from shared.planning.plan import DataStats
from shared.planning.planner import make_plan
from shared.planning.profiles import PROFILES
from trainer_node.engine.search.strategy.first_trial import arm_name

# PEFT asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("name", MODELS)
def test_every_arm_exists_on_the_arenas_models(name: str) -> None:
    shape, cpu = shape_from_config(build(name).config.to_dict()), parse_hardware("cpu-2x8GB")
    rows = DataStats(examples=150, tokens=6000, label_tokens=3000, max_length=200)
    plans = [make_plan(recipe, shape, rows, cpu, 3600.0) for recipe in grid.RECIPES.values()]
    assert {arm_name(plan) for plan in plans} >= set(grid.ARMS)


def test_points_do_not_change_one_another_and_a_longer_one_learns_more(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, recipe in grid.RECIPES.items():
        monkeypatch.setitem(PROFILES, name, recipe)
    path = make_job(profile=grid.RECIPE.profile, ready_by=2000.0)
    rows = json.loads((path.parent.parent / "rows.json").read_text())
    (path.parent / "test.json").write_text(json.dumps(rows[:20]))
    runner, test = grid.begin(decode_worker_job(path.read_bytes()), path.parent), rows_to_score(path)
    assert set(runner.known.plans) >= {"dense", "LoRA r8"}
    short, long = Point("dense", 3.0, 16, 0.5), Point("dense", 3.0, 16, 2.0)
    first = grid.losses_of(runner, short, test)
    assert grid.losses_of(runner, short, test) == first
    longer = grid.losses_of(runner, long, test)
    other_arm = grid.losses_of(runner, Point("LoRA r8", 3.0, 16, 0.5), test)
    assert len(first) == len(test) == 20
    assert grid.losses_of(runner, short, test) == first
    assert sum(longer) < sum(first)
    assert other_arm != first
    assert not list((path.parent / "checkpoints").glob("step-*"))


def test_a_point_that_diverges_has_no_losses(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, recipe in grid.RECIPES.items():
        monkeypatch.setitem(PROFILES, name, recipe)
    path = make_job(profile=grid.RECIPE.profile, ready_by=2000.0)
    (path.parent / "test.json").write_text((path.parent.parent / "rows.json").read_text())
    runner = grid.begin(decode_worker_job(path.read_bytes()), path.parent)
    assert grid.losses_of(runner, Point("dense", 1e30, 16, 0.5), rows_to_score(path)) == []
