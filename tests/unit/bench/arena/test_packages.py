"""Packages that a mirror does not deliver."""

from pathlib import Path

import pytest

from bench.arena import packages


@pytest.mark.parametrize(
    ("commands", "said"),
    [
        ("exec sleep 60", "apt-get update is not done within 0.2 s"),
        ("echo no such package >&2; exit 1", "apt-get update failed: no such package"),
    ],
)
def test_what_fails_or_hangs_is_named_and_nothing_stays(
    commands: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "bin" / "apt-get"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n{commands}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")
    monkeypatch.setattr(packages, "COMMAND_S", 0.2)
    with pytest.raises(RuntimeError, match=said):
        packages.fetch("wordnet-base", tmp_path / "cache")
    assert list((tmp_path / "cache" / "packages").iterdir()) == []
