"""Who may ask: the allow-list and the file of stakes, also while it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.telemetry.refusals import RefusalReason
from gateway.upstream.validators import Validators
from shared.errors import SettingsError

ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
BOB = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"


def node(hotkey: str, stake: float) -> dict[str, object]:
    """As fiber writes it."""
    numbers = dict.fromkeys(("incentive", "alpha_stake", "tao_stake", "trust", "vtrust", "last_updated"), 0.0)
    return {
        "hotkey": hotkey,
        "coldkey": "c",
        "node_id": 1,
        "netuid": 56,
        "stake": stake,
        "ip": "0",
        "port": 1,
        **numbers,
    }


async def test_stakes_are_read_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    validators = Validators((), path, 1000.0)
    await validators.refresh()
    assert validators.why_not(ALICE) == (RefusalReason.UNKNOWN, "Hotkey not found in metagraph")
    path.write_text(json.dumps({ALICE: node(ALICE, 1000.0), BOB: node(BOB, 999.9)}))
    await validators.refresh()
    assert validators.why_not(ALICE) is None
    assert validators.why_not(BOB) == (RefusalReason.STAKE, "Insufficient stake of 999.9")
    path.write_text("{ half")
    await validators.refresh()
    assert validators.why_not(ALICE) is None  # those who were in the last good one
    path.write_text(json.dumps({BOB: node(BOB, 2000.0)}))
    await validators.refresh()
    assert validators.why_not(ALICE) == (RefusalReason.UNKNOWN, "Hotkey not found in metagraph")
    assert validators.why_not(BOB) is None


async def test_an_allowed_address_needs_no_stake(tmp_path: Path) -> None:
    validators = Validators((ALICE,), None, 1000.0)
    await validators.refresh()
    assert validators.why_not(ALICE) is None
    assert validators.why_not(BOB) is not None


def test_an_allowed_address_must_be_one() -> None:
    with pytest.raises(SettingsError, match=r"upstream_validators.*checksum"):
        Validators((ALICE[:-1] + "Z",), None, 0.0)
