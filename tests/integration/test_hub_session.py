"""What a hub does wrong, request by request; to be quick, the library speaks to it from this process."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from bench.harness.fake_hub import FakeHub
from shared.files import folder_digest
from trainer_node.artifacts.hub_process import GO, Absent, Found, Reply, Request, Trouble, answer

REPO = "me/expected"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's own use


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The options that the process of its own gets from its environment."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    set_client_factory(default_client_factory)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 2500)
    (folder / "more.safetensors").write_bytes(b"m")
    return folder


def ask(hub: FakeHub, folder: Path | None, *, silence_s: float = 10, **values: Any) -> Reply:
    go: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    go.put(GO)
    known: dict[str, Any] = {
        "url": hub.url,
        "token": hub.token,
        "repository": REPO,
        "task": "t",
        "silence_s": silence_s,
    }
    return answer(Request(**(known | values), folder=str(folder) if folder else None), go)


@pytest.mark.parametrize(
    ("kind", "fault", "says"),
    [
        ("commits", 500, "answers 500"),
        ("commits", "drop", "no answer from"),
        ("create", 503, "answers 503"),
        ("tree", "hang", "no answer from"),
        ("preupload", (429, 300), "answers 429, try again in 300 s"),
        ("batch", "hang", "no answer from"),
        ("put", 403, "an upload was answered 403"),
        ("put", (503, 9999), "answers 503, try again in 9999 s"),
        ("verify", 500, "answers 500"),
        ("commit", 503, "answers 503"),
        ("commit", (429, 2), "try again in 2 s"),
        ("commit", 400, "the hub answers 400: injected fault"),
        ("commit", 409, "no submission after the commit was sent"),
        ("commit", "drop", "no answer from"),
        ("commit", "lost", "no answer from"),
        ("resolve", 404, "404"),
    ],
)
def test_what_breaks_is_said_and_the_next_try_ends_with_one_commit(
    hub: FakeHub, export: Path, capsys: pytest.CaptureFixture[str], kind: str, fault: Any, says: str
) -> None:
    hub.fault(kind, fault)
    broken = ask(hub, export, silence_s=0.5 if fault == "hang" else 10)
    assert isinstance(broken, Trouble)
    assert says in broken.error
    hub.faults.clear()  # on a machine that is slow enough, something else was silent first
    found = ask(hub, export)
    assert found == Found(hub.repos[REPO][-1]["id"], folder_digest(export))
    assert [commit["title"] for commit in hub.repos[REPO]] == ["initial commit", "podium: t"]
    assert hub.token not in broken.error + "".join(capsys.readouterr())


def test_a_second_try_uploads_only_what_is_missing(hub: FakeHub, export: Path) -> None:
    hub.fault("commit", 500)
    assert isinstance(ask(hub, export), Trouble)
    sent = hub.seen.count("put")
    assert sent == 4  # three parts and a small one
    assert isinstance(ask(hub, export), Found)
    assert hub.seen.count("put") == sent


def test_a_part_that_breaks_is_sent_again_at_once(hub: FakeHub, export: Path) -> None:
    hub.fault("put", "drop")
    assert isinstance(ask(hub, export), Found)
    assert hub.seen.count("put") == 5


def test_to_look_changes_nothing(hub: FakeHub) -> None:
    assert ask(hub, None) == Absent()
    hub.create({"name": "expected"})
    assert ask(hub, None) == Absent()
    assert len(hub.repos[REPO]) == 1
    assert set(hub.seen) == {"commits", "tree"}


def test_what_is_not_the_tasks_is_neither_overwritten_nor_named(hub: FakeHub, export: Path) -> None:
    hub.create({"name": "expected"})
    hub.commit(REPO, "podium: another", {"model.safetensors": b"theirs"})
    for folder in (export, None):
        said = ask(hub, folder)
        assert isinstance(said, Trouble)
        assert "holds something that is not this task's" in said.error
    assert len(hub.repos[REPO]) == 2


def test_the_first_submission_stays_and_is_named(hub: FakeHub, export: Path) -> None:
    first = ask(hub, export)
    assert hub.visibility[REPO] == "public"  # upstream has to read it, whatever an organisation's default is
    (export / "more.safetensors").write_bytes(b"another run")
    assert ask(hub, export) == first
    assert len(hub.repos[REPO]) == 2


def test_what_comes_on_top_of_the_submission_changes_nothing(hub: FakeHub, export: Path) -> None:
    first = ask(hub, export)
    hub.commit(REPO, "a human edits", {"README.md": b"hello"})
    assert ask(hub, export) == first == ask(hub, None)


def test_a_token_that_may_not_is_told_from_one_that_is_none(hub: FakeHub, export: Path) -> None:
    assert ask(hub, export, repository="you/expected") == Trouble(
        "the token may not write to you/expected (403): it needs the right to write there"
    )
    refused = Trouble("the hub refuses the token (401): check hub_token_file or HF_TOKEN")
    assert ask(hub, export, token="hf_wrong") == refused == ask(hub, None, token="hf_wrong")
