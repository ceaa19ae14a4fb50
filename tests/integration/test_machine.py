"""What doctor finds out of this machine: real files, a real clock, a real socket and a stand-in of a hub."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from bench.harness.fake_hub import TOKEN, FakeHub
from gateway.server import listening_socket, running
from podium.diagnostics.machine import (
    HubVitals,
    clock_is_synchronised,
    driver_version,
    probe_address,
    probe_hotkey,
    probe_hub,
    probe_torch,
)
from shared.broker.bus import Bus
from shared.net import free_port
from shared.settings import Settings


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
            "550.54.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
        ("something else\n", "unknown"),
    ],
)
def test_the_version_of_a_driver(text: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "none") is None


def test_torch_is_read_without_importing_it() -> None:
    torch = pytest.importorskip("torch")
    assert probe_torch() == (torch.__version__, torch.version.cuda)


def test_the_kernel_knows_whether_its_clock_is_kept() -> None:
    assert clock_is_synchronised() in (True, False)


def hub_settings(make_settings: Callable[..., Settings], hub: FakeHub, file: Path) -> Settings:
    return make_settings(artifacts_kind="hub", hub_namespace="me", hub_url=hub.url, hub_token_file=str(file))


def test_a_hub_says_whose_token_it_is(
    hub: FakeHub, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    settings = hub_settings(make_settings, hub, file)
    assert probe_hub(settings) == HubVitals(names=("me", "team"), may_write=True)
    hub.role = "read"
    assert probe_hub(settings).may_write is False
    hub.role = "fineGrained"
    assert probe_hub(settings).may_write is None


def test_a_hub_that_refuses_fails_or_is_away(
    hub: FakeHub, make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    file = tmp_path / "token"
    settings = hub_settings(make_settings, hub, file)
    assert "No such file" in (probe_hub(settings).error or "")
    file.write_text("")
    assert "there is no token" in (probe_hub(settings).error or "")
    file.write_text("wrong")
    assert "refuses the token (401)" in (probe_hub(settings).error or "")
    file.write_text(TOKEN)
    hub.fault("whoami", 500, "drop")
    assert "answers 500" in (probe_hub(settings).error or "")
    assert "can't be reached" in (probe_hub(settings).error or "")


def test_a_hotkey_with_a_typo() -> None:
    good = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
    assert probe_hotkey(good) is probe_hotkey(None) is None
    assert "wrong checksum" in (probe_hotkey(good.replace("w", "x", 1)) or "")


@pytest.fixture
async def port(settings: Settings, bus: Bus) -> AsyncIterator[int]:
    listening = listening_socket(settings, {})
    async with running(settings, listening):
        yield int(listening.getsockname()[1])


async def test_a_public_address_is_tried(port: int, hub: FakeHub) -> None:
    assert await asyncio.to_thread(probe_address, f"127.0.0.1:{port}") is None
    assert "refused" in (await asyncio.to_thread(probe_address, f"127.0.0.1:{free_port()}") or "")
    other = hub.url.removeprefix("http://")
    assert "something else listens there" in (await asyncio.to_thread(probe_address, other) or "")
    assert await asyncio.to_thread(probe_address, "not an address") is not None
