"""What doctor makes of a machine: driver and torch, clock, hub, hotkey, address, room for a large run."""

from __future__ import annotations

from typing import Any

import pytest

from podium.diagnostics.checks import examine
from podium.diagnostics.findings import Severity
from podium.diagnostics.machine import HubVitals, MachineVitals
from podium.diagnostics.monitor import Monitor
from podium.diagnostics.probe import Folder, GatewayVitals, Vitals
from shared.settings import Settings

HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
GPUS = {"gpus": 8, "driver": "580.65.06", "torch": "2.13.0+cu130", "torch_cuda": "13.0"}
HUB: dict[str, Any] = {"artifacts_kind": "hub", "hub_namespace": "me"}
UNKNOWN: dict[str, Any] = {"hotkey": HOTKEY, "upstream_validators": ("5One",)}  # no host chosen here
OPEN = UNKNOWN | {"gateway_host": "0.0.0.0"}


def found(
    check: str, machine: dict[str, Any], folders: tuple[Folder, ...] = (), **settings: Any
) -> list[tuple[Severity, str, str]]:
    """What one check says of a machine, but that it is fine."""
    vitals = Vitals(
        now=0.0,
        version="1",
        settings=Settings(**settings),
        broker_error="not asked",
        monitor=Monitor(url="u"),
        gateway=GatewayVitals(url="u"),
        folders=folders,
        machine=MachineVitals(**machine),
        chosen=frozenset(settings),
    )
    return [
        (each.severity, each.what, each.do)
        for each in examine(vitals)
        if each.check == check and each.severity is not Severity.OK
    ]


@pytest.mark.parametrize(
    ("machine", "settings", "severity", "what"),
    [
        (GPUS | {"driver": None}, {}, Severity.ERROR, "has 8 NVIDIA GPU(s), and no driver is loaded"),
        (GPUS | {"driver": None}, {"hardware": "cpu"}, Severity.NOTE, "no driver is loaded"),
        (GPUS | {"torch": "2.13.0+cpu", "torch_cuda": None}, {}, Severity.ERROR, "is a build for CPUs"),
        (GPUS | {"driver": "570.86.15"}, {}, Severity.ERROR, "570.86.15 is too old for torch's CUDA 13.0"),
        (
            GPUS | {"driver": "520.1", "torch_cuda": "12.8"},
            {},
            Severity.ERROR,
            "too old for torch's CUDA 12.8",
        ),
    ],
)
def test_a_driver_that_does_not_fit(
    machine: dict[str, Any], settings: dict[str, Any], severity: Severity, what: str
) -> None:
    ((level, said, do),) = found("devices", machine, **settings)
    assert level is severity
    assert what in said
    assert do


@pytest.mark.parametrize(
    "machine",
    [
        GPUS,
        GPUS | {"driver": "535.104.05", "torch_cuda": "12.8"},  # minor versions are compatible
        GPUS | {"torch": None, "torch_cuda": None},  # a machine with a gateway only
        GPUS | {"driver": "unknown"},
        {"torch": "2.13.0+cpu"},  # a CPU
    ],
)
def test_a_driver_that_fits(machine: dict[str, Any]) -> None:
    assert found("devices", machine) == []


@pytest.mark.parametrize(
    ("hub", "what"),
    [
        (
            {"error": "https://hub refuses the token (401)"},
            "can't be uploaded: https://hub refuses the token",
        ),
        ({"names": ("other", "team")}, "belongs to other, team, and submissions go to 'me'"),
        ({"names": ("me",), "may_write": False}, "may only read"),
    ],
)
def test_a_token_that_can_not_upload(hub: dict[str, Any], what: str) -> None:
    ((level, said, _),) = found("hub", {"hub": HubVitals(**hub)}, **HUB)
    assert level is Severity.ERROR
    assert what in said


def test_a_token_that_can() -> None:
    for hub in (HubVitals(names=("x", "me"), may_write=True), HubVitals(names=("me",)), None):
        assert found("hub", {"hub": hub}, **HUB) == []


@pytest.mark.parametrize(
    ("machine", "settings", "what"),
    [
        ({"hotkey_error": "'x' is not base58"}, {"hotkey": "x"}, "can't be used: 'x' is not base58"),
        ({}, {"upstream_validators": ("5One",)}, "validators are configured and no hotkey"),
        ({}, {"hotkey": HOTKEY}, "a hotkey is set and no validator is known"),
    ],
)
def test_a_hotkey_that_refuses_everyone(machine: dict[str, Any], settings: dict[str, Any], what: str) -> None:
    ((level, said, _),) = found("hotkey", machine, **settings)
    assert level is Severity.ERROR
    assert what in said
    assert found("hotkey", {}, **OPEN) == []
    assert found("hotkey", {}) == []


@pytest.mark.parametrize(
    ("machine", "settings", "severity", "what"),
    [
        ({}, OPEN | {"gateway_host": "127.0.0.1"}, Severity.WARNING, "listens on 127.0.0.1 only"),
        ({}, OPEN, Severity.NOTE, "whether validators can reach the gateway is not known"),
        ({}, UNKNOWN, Severity.NOTE, "whether validators can reach the gateway is not known"),
        (
            {"public_error": "timed out"},
            OPEN | {"public_address": "h:1"},
            Severity.ERROR,
            "at h:1, the public",
        ),
    ],
)
def test_a_gateway_that_may_not_be_reached(
    machine: dict[str, Any], settings: dict[str, Any], severity: Severity, what: str
) -> None:
    ((level, said, _),) = found("reachability", machine, **settings)
    assert level is severity
    assert what in said


def test_an_address_that_does_not_answer_is_not_explained_by_a_default() -> None:
    """The gateway's own default is no fact about a socket that systemd or compose opened."""
    machine, settings = {"public_error": "timed out"}, UNKNOWN | {"public_address": "h:1"}
    ((_, unknown, _),) = found("reachability", machine, **settings)
    ((_, known, _),) = found("reachability", machine, **settings, gateway_host="127.0.0.1")
    assert unknown.endswith("the public address: timed out")
    assert known.endswith("timed out; the gateway listens on 127.0.0.1 only")


def test_a_gateway_that_is_reached_or_need_not_be() -> None:
    assert found("reachability", {}, **OPEN, public_address="h:1") == []
    assert found("reachability", {}) == []


def test_a_clock_that_nothing_keeps() -> None:
    ((level, said, do),) = found("time source", {"synchronised": False})
    assert (level, "not synchronised" in said, "set-ntp" in do) == (Severity.WARNING, True, True)
    assert found("time source", {"synchronised": True}) == found("time source", {}) == []


def test_a_disk_that_is_too_small_for_a_large_run() -> None:
    node = str(Settings().node)
    small, large = Folder(node, 10**12, 100 * 10**9), Folder(node, 10**12, 157 * 10**9)
    ((level, said, _),) = found("large run", GPUS, (small,))
    assert level is Severity.WARNING
    assert "100 GB are free" in said
    assert "writes 156 GB" in said
    assert found("large run", GPUS, (large,)) == found("large run", {}, (small,)) == []
