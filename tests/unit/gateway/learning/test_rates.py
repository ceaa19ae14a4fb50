"""Rates with and without evidence, and what the API shows of them."""

from __future__ import annotations

from gateway.learning.rates import LearnedRates, Rate, Table
from gateway.views.build import table_views


def test_without_evidence_the_house_values_hold() -> None:
    tables = LearnedRates()
    assert tables.task_weight.rate("DpoTask") == Rate(0.25, "house value for DpoTask")
    assert tables.model_performance.rate("llama").value == 0.75
    assert tables.task_success.rate("anything").value == 0.90


def test_what_was_learned_replaces_the_house_value_of_its_key_only() -> None:
    table = Table(0.75, {"llama": Rate(0.6, "12 results")})
    assert table.rate("llama") == Rate(0.6, "12 results")
    assert table.rate("qwen").value == 0.75


def test_the_api_shows_every_task_type_and_the_families_with_evidence() -> None:
    tables = LearnedRates(model_performance=Table(0.75, {"llama": Rate(0.6, "12 results", 7.2, 12.0)}))
    views = table_views(tables)
    assert list(views) == ["task_weight", "model_performance", "task_success", "delivery"]
    assert views["task_success"].rates["GrpoTask"].value == 0.90
    assert len(views["task_weight"].rates) == 5
    assert views["model_performance"].rates == {"llama": Rate(0.6, "12 results", 7.2, 12.0)}
