"""`podium track` says what is missing."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from podium.__main__ import main
from shared.net import free_port


def test_a_missing_trackio_is_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert main(["track", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("podium track: tracking needs trackio 0.43: pip install '.[tracking]' (")
    assert len(said.splitlines()) == 1


def test_a_trackio_that_is_built_otherwise_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trackio.sqlite_storage", ModuleType("trackio.sqlite_storage"))
    assert main(["track", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    said = capsys.readouterr().err
    assert "tracking needs trackio 0.43" in said
    assert "SQLiteStorage" in said
