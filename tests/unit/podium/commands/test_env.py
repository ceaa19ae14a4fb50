"""`podium env`: a report that can be pasted anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from podium.__main__ import main
from shared.version import version


def test_the_report_names_versions_and_holds_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PODIUM_NATS_URL", "nats://user:pa55@host:4222")
    monkeypatch.setenv("PODIUM_DATA_DIR", str(tmp_path / "not" / "there"))
    assert main(["env", "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said)
    assert found["podium"]["version"] == version()
    assert found["podium"]["at"].endswith(" UTC")
    assert found["packages"]["msgspec"][0].isdigit()
    assert found["environment"]["HF_TOKEN"] == "set"
    assert found["settings"]["PODIUM_NATS_URL"] == "nats://user:***@host:4222 (from environment)"
    assert str(tmp_path) in found["machine"]["disk"]
    assert "hf_secret" not in said
    assert "pa55" not in said


def test_settings_that_cannot_be_used_do_not_end_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PODIUM_SLOTT", "a")
    assert main(["env"]) == 0
    assert "unknown setting PODIUM_SLOTT" in capsys.readouterr().out
