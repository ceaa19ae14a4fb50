"""The alert rules for Prometheus: each asks for metrics that a gateway shows, and says what to do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILE = ROOT / "deploy" / "prometheus" / "alerts.yml"
RULES = re.split(r"(?m)^      - alert: ", FILE.read_text())[1:]
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


def test_a_full_log_pages() -> None:
    (rule,) = [rule for rule in RULES if "podium_log_full" in rule]
    assert "severity: page" in rule


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs apt-get install prometheus")
@pytest.mark.parametrize(
    ("alert", "metric"),
    [("PodiumSlotDown", "podium_slot_live"), ("PodiumSlotHardware", "podium_slot_expected_hardware")],
)
@pytest.mark.parametrize(
    ("drained", "has_job", "pages"), [(0, False, 1), (0, True, 1), (1, False, 0), (1, True, 1)]
)
def test_a_drained_slot_without_a_job_pages_nobody(
    tmp_path: Path, alert: str, metric: str, drained: int, *, has_job: bool, pages: int
) -> None:
    """An operator drains a slot to stop its node or to change its GPUs; slot b is drained and well."""
    series = {(metric, "a"): 0, (metric, "b"): 1}
    series |= {("podium_slot_drained", "a"): drained, ("podium_slot_drained", "b"): 1}
    if has_job:
        series["podium_job_deadline_seconds", "a"] = 3600
    firing = f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)'
    case = {
        "interval": "30s",
        "input_series": [
            {"series": f'{name}{{instance="g", slot="{slot}"}}', "values": f"{value}x20"}
            for (name, slot), value in series.items()
        ],
        "promql_expr_test": [
            {"expr": firing, "eval_time": "5m", "exp_samples": [{"labels": "{}", "value": pages}]}
        ],
    }
    test = tmp_path / "test.yml"  # JSON is YAML
    test.write_text(json.dumps({"rule_files": [str(FILE)], "evaluation_interval": "30s", "tests": [case]}))
    command = ["promtool", "test", "rules", str(test)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
