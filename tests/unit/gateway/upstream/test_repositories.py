"""One repository for each kind of contest, and no answer that would cost a fee for nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.upstream.contract import TrainingRepo
from gateway.upstream.repositories import KINDS, NotEnteredError, faults, training_repo
from shared.settings import Settings

COMMIT = "0123456789" * 4
TOKEN = "github_pat_secret"
TEXT = {"github_repo": "https://git.example/me/text", "commit_hash": COMMIT}
IMAGE = {
    "github_repo": "https://git.example/me/image",
    "commit_hash": COMMIT,
    "github_token": TOKEN,
    "requested_datasets": ["a/b", "c/d"],
}


def settings(path: Path, content: Any) -> Settings:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Settings(training_repos_file=str(path))


def test_each_kind_has_its_own(tmp_path: Path) -> None:
    own = settings(tmp_path / "repos.json", {"text": TEXT, "image": IMAGE})
    assert training_repo(own, "text") == TrainingRepo(TEXT["github_repo"], COMMIT)
    assert training_repo(own, "image") == TrainingRepo(
        "https://git.example/me/image", COMMIT, TOKEN, ["a/b", "c/d"]
    )
    with pytest.raises(NotEnteredError, match="for environment tasks"):
        training_repo(own, "environment")


def test_the_file_is_read_again(tmp_path: Path) -> None:
    own = settings(tmp_path / "repos.json", {"text": TEXT})
    settings(tmp_path / "repos.json", {"text": {**TEXT, "commit_hash": "f" * 40}})
    assert training_repo(own, "text").commit_hash == "f" * 40


def test_two_settings_are_the_text_trainer_only() -> None:
    own = Settings(training_repo=TEXT["github_repo"], training_commit=COMMIT)
    assert training_repo(own, "text") == TrainingRepo(TEXT["github_repo"], COMMIT)
    for kind in ("image", "environment"):
        with pytest.raises(NotEnteredError):
            training_repo(own, kind)


def test_nothing_is_entered_without_settings() -> None:
    for kind in KINDS:
        with pytest.raises(NotEnteredError, match="PODIUM_TRAINING_REPOS_FILE"):
            training_repo(Settings(), kind)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not the JSON"),
        ([], "is not the JSON"),
        ({"text": {"github_repo": "https://x"}}, "commit_hash"),
        ({"text": {**IMAGE, "github_tokn": "x"}}, "github_tokn"),
        ({"txt": TEXT}, "the kinds are text, image, environment"),
        ({"text": {**TEXT, "commit_hash": "main"}}, "40 hexadecimal digits"),
        ({"text": {**TEXT, "commit_hash": COMMIT[:39] + "\n"}}, "40 hexadecimal digits"),
        ({"text": {**TEXT, "github_repo": "git@git.example:me/text"}}, "https URL"),
        ({"text": {**TEXT, "github_repo": f"http://me:{TOKEN}@git.example/text"}}, "https URL"),
        ({"text": {**TEXT, "requested_datasets": ["a/b"] * 3}}, "at most 2"),
    ],
)
def test_what_upstream_would_exclude_is_not_entered(content: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(NotEnteredError, match=words) as refused:
        training_repo(settings(tmp_path / "repos.json", content), "text")
    assert TOKEN not in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotEnteredError, match="can't be read"):
        training_repo(Settings(training_repos_file=str(tmp_path / "none.json")), "text")


def test_faults_are_listed_once_and_a_kind_left_out_is_none(tmp_path: Path) -> None:
    assert faults(Settings()) == []
    assert faults(settings(tmp_path / "repos.json", {"text": TEXT})) == []
    (fault,) = faults(settings(tmp_path / "repos.json", "{"))
    assert "is not the JSON" in fault
    (tmp_path / "repos.json").write_bytes(b'{"text": {"github_repo": "\xff"}}')
    (fault,) = faults(Settings(training_repos_file=str(tmp_path / "repos.json")))
    assert "is not the JSON" in fault
    wrong = {"text": {**TEXT, "commit_hash": "main"}, "image": {**IMAGE, "commit_hash": "main"}}
    assert [fault.split()[4] for fault in faults(settings(tmp_path / "repos.json", wrong))] == [
        "text",
        "image",
    ]
