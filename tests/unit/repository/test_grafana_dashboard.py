"""The Grafana dashboard's file: panels that stand side by side, and queries that Prometheus understands."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "podium.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", ())]


def test_panels_have_their_own_ids_and_places() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids) >= 20
    for one, other in itertools.combinations([panel["gridPos"] for panel in PANELS], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)


def test_every_panel_asks_the_data_source_that_is_provided() -> None:
    assert "    uid: podium\n" in (ROOT / "deploy" / "grafana" / "datasources.yml").read_text()
    for panel in PANELS:
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "podium", panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["datasource"]["uid"] == "podium" for target in panel["targets"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs apt-get install prometheus")
def test_prometheus_reads_the_queries_the_alerts_and_its_configuration(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(QUERIES)]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    configuration = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()
    alerts = ROOT / "deploy" / "prometheus" / "alerts.yml"
    (tmp_path / "token").write_text("t")
    local = configuration.replace("/etc/prometheus/alerts.yml", str(alerts))
    (tmp_path / "prometheus.yml").write_text(
        local.replace("/run/podium/podium.token", str(tmp_path / "token"))
    )
    for check in (["rules", "panels.yml"], ["rules", str(alerts)], ["config", "prometheus.yml"]):
        done = subprocess.run(
            ["promtool", "check", *check], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
