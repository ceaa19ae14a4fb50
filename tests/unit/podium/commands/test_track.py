"""`podium track` says what is missing."""

from __future__ import annotations

import sys

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
    assert said == "podium track: tracking needs the package trackio: pip install 'podium[tracking]'\n"
