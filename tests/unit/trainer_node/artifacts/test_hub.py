"""What a node hears from the process that uploads, and a token's file, whatever is in them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from shared.messages.jobs import Job
from shared.settings_sources import load_settings
from trainer_node.artifacts import hub
from trainer_node.artifacts.hub import Hub
from trainer_node.artifacts.interface import StoreError

JOB = cast(Job, SimpleNamespace(task="t", offer=SimpleNamespace(expected_repo_name="name")))


def connected(folder: Path, token: bytes = b"secret") -> Hub:
    (folder / "token").write_bytes(token)
    token_file = str(folder / "token")
    return Hub(load_settings({}, hub_namespace="me", hub_token_file=token_file, node_dir=str(folder)))


NESTED = """'{"type": "Absent", "more": ' + '[' * 30_000"""


@pytest.mark.parametrize("said", ["'Downloading'", NESTED, "'x' * 100_000"])  # a line has 64 KiB at most
async def test_an_answer_that_can_not_be_read_is_tried_again(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "COMMAND", (sys.executable, "-c", f"print({said})"))
    with pytest.raises(StoreError, match="me/name: the process that uploads said what can't be read"):
        await connected(tmp_path).find(JOB)


async def test_a_token_that_is_no_text_is_named_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"hub_token_file .*token is not a text") as error:
        await connected(tmp_path, b"hf_abc\xff").find(JOB)
    assert "hf_abc" not in str(error.value)
    assert error.value.__cause__ is None
