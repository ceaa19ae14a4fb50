"""The table of ablations, from losses that are known."""

from pathlib import Path

import msgspec
import pytest

from bench.ablations.ablations import Line, gap, read_lines, summary, table
from bench.ablations.trainer import STABLE_TAIL, StableShape, VariantResult
from bench.ablations.variants import BASE, GROUPS, Training, Variant, variants_of
from bench.arena.task import Task

CLEAN = Task("wordnet", "llama", 10, 8.0, 0)
DAMAGED = Task("wordnet", "llama", 10, 8.0, 0, "noise")
OTHER = Variant("batch 8", Training(batch=8))


def result(variant: Variant, *losses: float) -> VariantResult:
    return VariantResult(variant, list(losses), 1.0)


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


def test_methods_are_judged_on_clean_and_damaged_models_apart() -> None:
    base, lora = GROUPS["method"][:2]
    known = {
        CLEAN: {base: result(base, 2.0), lora: result(lora, 2.1)},
        DAMAGED: {base: result(base, 2.0), lora: result(lora, 1.8)},
    }
    gaps = {one.group: one.nat for one in table(["method"], known) if one.variant == lora.name}
    assert gaps == pytest.approx({"method": -0.05, "method, clean": 0.1, "method, damaged": -0.2})


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
