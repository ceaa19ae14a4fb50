"""What is said and refused of the settings that let validators in."""

from __future__ import annotations

from typing import Any

import pytest

from bench.fake_validator.validator import keys_from_seed
from gateway.upstream.auth import ClosedGate, OpenGate, SignedGate, gate_of, remarks
from gateway.upstream.nonces import Nonces
from gateway.upstream.validators import Validators
from shared.errors import SettingsError
from shared.settings_sources import load_settings

MINER, VALIDATOR = keys_from_seed("miner").address, keys_from_seed("validator").address


def gate(**values: Any) -> object:
    return gate_of(load_settings({}, **values), Validators((), None, 0.0), Nonces("g"))


def test_the_gate_that_the_settings_ask_for() -> None:
    assert isinstance(gate(), ClosedGate)
    assert isinstance(gate(hotkey=MINER), SignedGate)
    assert isinstance(gate(hotkey=MINER, upstream_auth="off"), OpenGate)


def test_a_hotkey_must_be_an_address() -> None:
    with pytest.raises(SettingsError, match=r"hotkey: .*checksum"):
        gate(hotkey=MINER[:-1] + ("1" if MINER[-1] != "1" else "2"))


def test_signatures_can_be_off_on_loopback_only() -> None:
    with pytest.raises(SettingsError, match="loopback only"):
        load_settings({}, upstream_auth="off", gateway_host="0.0.0.0")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, []),
        ({"hotkey": MINER}, ["no validator is allowed", "artifacts_kind is disk"]),
        ({"hotkey": MINER, "upstream_validators": [VALIDATOR]}, ["artifacts_kind is disk"]),
        (
            {
                "hotkey": MINER,
                "upstream_nodes_file": "nodes.json",
                "artifacts_kind": "hub",
                "hub_namespace": "me",
            },
            [],
        ),
        ({"hotkey": MINER, "upstream_auth": "off"}, []),
    ],
)
def test_what_would_make_validators_ask_in_vain_is_said(values: dict[str, Any], said: list[str]) -> None:
    found = remarks(load_settings({}, **values))
    assert len(found) == len(said)
    for remark, words in zip(found, said, strict=True):
        assert words in remark
