"""The table of ablations, from losses that are known."""

import pytest
from msgspec.structs import replace

from bench.ablations.gaps import by_spread, gap, summary, table
from bench.ablations.variants import BASE, GROUPS
from tests.unit.bench.ablations.known_results import CLEAN, DAMAGED, OTHER, result


def test_a_gap_is_paired_by_rows_and_its_sign_says_which_is_better() -> None:
    known = {
        CLEAN: {BASE: result(BASE, 2.0, 3.0), OTHER: result(OTHER, 1.9, 2.9)},
        DAMAGED: {BASE: result(BASE, 5.0, 5.0), OTHER: result(OTHER, 5.2, 5.2)},
    }
    found = gap("batch", OTHER, BASE, known)
    assert found.nat == pytest.approx(0.05)
    assert (found.better, found.tasks, found.diverged) == (1, 2, 0)
    assert found.low == pytest.approx(-0.1)
    assert found.high == pytest.approx(0.2)


def test_a_run_that_diverged_is_counted_and_in_no_mean() -> None:
    known = {
        CLEAN: {BASE: result(BASE, 2.0), OTHER: result(OTHER)},
        DAMAGED: {BASE: result(BASE, 3.0), OTHER: result(OTHER, 2.5)},
    }
    found = gap("batch", OTHER, BASE, known)
    assert (found.nat, found.tasks, found.diverged) == (-0.5, 1, 1)
    assert "1 diverged" in str(found)
    assert summary([found], 2)["diverged"] == 1


def test_a_variant_that_was_not_run_says_so() -> None:
    assert "not run" in str(gap("batch", OTHER, BASE, {CLEAN: {BASE: result(BASE, 2.0)}}))


def test_every_group_is_judged_on_clean_and_damaged_models_apart() -> None:
    base, other = GROUPS["batch"][:2]
    known = {
        CLEAN: {base: result(base, 2.0), other: result(other, 2.1)},
        DAMAGED: {base: result(base, 2.0), other: result(other, 1.8)},
    }
    gaps = {one.group: one.nat for one in table(["batch"], known, {}) if one.variant == other.name}
    assert gaps == pytest.approx({"batch": -0.05, "batch, clean": 0.1, "batch, damaged": -0.2})


def test_without_damaged_models_nothing_is_said_of_them() -> None:
    known = {CLEAN: {BASE: result(BASE, 2.0), OTHER: result(OTHER, 2.1)}}
    assert {one.group for one in table(["batch"], known, {})} == {"batch", "batch, clean"}


def test_the_seeds_of_a_task_count_as_one_task() -> None:
    known = {
        CLEAN: {BASE: result(BASE, 2.0, 2.0), OTHER: result(OTHER, 2.4, 1.9)},
        replace(CLEAN, seed=1): {BASE: result(BASE, 3.0, 3.0), OTHER: result(OTHER, 2.8, 2.7)},
        DAMAGED: {BASE: result(BASE, 5.0), OTHER: result(OTHER, 5.3)},
    }
    found = gap("batch", OTHER, BASE, known)
    assert found.nat == pytest.approx((-0.05 + 0.3) / 2)  # rows of the first: +.1 and -.2
    assert (found.better, found.tasks) == (1, 2)


def test_the_loss_is_judged_by_the_spread_of_lengths_and_seeds_stay_together() -> None:
    base, tokens = GROUPS["loss"]
    far, near = replace(CLEAN, seed=1), replace(CLEAN, source="foldoc")
    spreads = {CLEAN: 0.2, far: 1.9, near: 0.5}  # the mean of the first two is the larger one
    known = {
        task: {base: result(base, 2.0), tokens: result(tokens, 2.0 + spread)}
        for task, spread in spreads.items()
    }
    small, large = by_spread(known, spreads)
    assert (set(small), set(large)) == ({near}, {CLEAN, far})
    gaps = {one.group: one.nat for one in table(["loss"], known, spreads)}
    assert gaps["loss, small spread"] == pytest.approx(0.5)
    assert gaps["loss, large spread"] == pytest.approx(1.05)
