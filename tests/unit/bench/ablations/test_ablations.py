"""Groups, tasks and the results file of the ablations."""

from pathlib import Path

import msgspec
import pytest

from bench.ablations.ablations import TASKS, Line, read_lines, with_seeds
from bench.ablations.trainer import STABLE_TAIL, StableShape
from bench.ablations.variants import BASE, GROUPS, variants_of
from tests.unit.bench.ablations.known_results import CLEAN, DAMAGED, OTHER, result


def test_every_group_compares_distinct_trainings_and_its_names_are_unique() -> None:
    for name, variants in GROUPS.items():
        assert len(variants) > 1, name
        assert len(set(variants)) == len({one.name for one in variants}) == len(variants)
        assert len({(one.training, one.runs, one.scale, one.temperature) for one in variants}) == len(
            variants
        )


def test_a_variant_of_several_groups_is_trained_once() -> None:
    assert sum(variant == BASE for variant in variants_of(list(GROUPS))) == 1
    assert set(variants_of(["batch"])) == set(GROUPS["batch"])


def test_a_task_s_seeds_have_other_rows_and_the_first_ones_stay() -> None:
    assert with_seeds([CLEAN, DAMAGED], 1) == [CLEAN, DAMAGED]
    assert [task.seed for task in with_seeds([CLEAN, DAMAGED], 2)] == [0, 0, 1, 1]
    assert len(set(with_seeds(TASKS, 3))) == 3 * len(TASKS)


def test_results_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read_lines(path) == {}
    path.write_bytes(msgspec.json.encode(Line(DAMAGED, result(OTHER, 1.0))) + b"\n")
    assert read_lines(path) == {DAMAGED: {OTHER: result(OTHER, 1.0)}}


def test_the_stable_rate_is_constant_and_ends_at_zero() -> None:
    shape = StableShape(0.1)
    assert shape.at(0.05) == pytest.approx(0.5)
    assert shape.at(0.1) == shape.at(0.99 - STABLE_TAIL) == 1.0
    assert shape.at(1 - STABLE_TAIL / 2) == pytest.approx(0.5)
    assert shape.at(1.0) == 0.0
