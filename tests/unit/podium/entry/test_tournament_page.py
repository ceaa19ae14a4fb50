"""The commands of docs/tournament.md, run as they stand where this machine can run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.tournament.play import main as play
from gateway.upstream.repositories import training_repo
from shared.settings import Settings

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs" / "tournament.md").read_text()
BUILD, TRY = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


def test_the_entry_of_the_page_is_built_and_has_no_objections(tmp_path: Path) -> None:
    (tmp_path / "upstream").mkdir()
    (tmp_path / "upstream" / "LICENSE.md").write_text("Licence\n")
    (tmp_path / "upstream" / "NOTICE").write_text("Notice\n")
    (tmp_path / "git").write_text("[user]\nname = x\nemail = x@example.org\n")
    commands = BUILD.replace("podium entry", f"{sys.executable} -m podium entry")
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GIT_CONFIG_GLOBAL": str(tmp_path / "git")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"objections": []}


def test_the_benchs_options_are_those_of_the_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tournament", "--help"])
    with pytest.raises(SystemExit) as ended:
        play()
    assert ended.value.code == 0
    known = capsys.readouterr().out
    lines = [line for line in PAGE.splitlines() if "bench tournament" in line]
    options = {option for line in [*lines, TRY] for option in re.findall(r"--[a-z]+", line)}
    assert {"--cases", "--minutes", "--code", "--image"} <= options
    assert not [option for option in options if option not in known]


def test_the_file_of_the_page_is_answered(tmp_path: Path) -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "repos.json").write_text(text)
    answer = training_repo(Settings(training_repos_file=str(tmp_path / "repos.json")), "text")
    assert answer.github_repo == "https://github.com/me/text-trainer"
    assert answer.github_token is None
