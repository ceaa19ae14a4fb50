"""The alert rules for Prometheus: each asks for metrics that a gateway shows, and says what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RULES = re.split(r"(?m)^      - alert: ", (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())[1:]
METRICS = set(re.findall(r'"(podium_\w+)"', (ROOT / "gateway" / "api" / "metrics.py").read_text()))
COUNTERS = {f"{name}_total" for name in METRICS}  # the client library adds it


def test_there_are_rules() -> None:
    assert len(RULES) >= 9


@pytest.mark.parametrize("rule", RULES, ids=[rule.splitlines()[0] for rule in RULES])
def test_a_rule_asks_for_what_there_is_and_says_what_to_do(rule: str) -> None:
    expression = re.search(r"(?m)^        expr: (.+)$", rule)
    assert expression is not None
    asked = set(re.findall(r"podium_\w+", expression[1]))
    assert asked <= METRICS | COUNTERS
    assert asked or "up{" in expression[1]
    assert re.search(r"severity: (page|ticket)", rule)
    assert re.search(r'summary: "\S', rule)
    assert re.search(r'do: "\S', rule)
