"""Addresses and signatures, held against published ones and against every way to get them wrong."""

from __future__ import annotations

import pytest
import sr25519
from hypothesis import given
from hypothesis import strategies as st

from bench.fake_validator.validator import ss58
from gateway.upstream.hotkeys import AddressError, public_key, verified

# The development account //Alice of every substrate chain.
ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
ALICE_KEY = bytes.fromhex("d43593c715fdd31c61141abd04a99fd6822c8558854ccde39a5684e7a56da27d")
PAIR = sr25519.pair_from_seed(bytes(32))
ADDRESS = ss58(PAIR[0])
MESSAGE = b"1_x:miner:hash"


def sign(message: bytes) -> str:
    return "0x" + sr25519.sign(PAIR, message).hex()


def test_a_published_address_is_its_key() -> None:
    assert public_key(ALICE) == ALICE_KEY
    assert ss58(ALICE_KEY) == ALICE


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("", "not an ss58 address"),
        (ALICE[:-1], "not an ss58 address|checksum"),
        (ALICE[:-1] + "Z", "checksum"),
        (ALICE.replace("G", "0", 1), "base58"),
        ("1" * 48, "not an ss58 address"),
        ("5" * 1000, "47 or 48"),
        ("é" * 48, "base58"),
        ("15oF4uVJwmo4TdGW7VfQxNLavjCXviqxT9S1MgbjMNHr6Sp5", "format 42"),  # a Polkadot address
    ],
)
def test_what_is_no_address_says_why(address: str, why: str) -> None:
    with pytest.raises(AddressError, match=why):
        public_key(address)


def test_a_signature_holds_for_its_message_and_key_only() -> None:
    signature = sign(MESSAGE)
    assert verified(ADDRESS, MESSAGE, signature)
    assert not verified(ADDRESS, MESSAGE + b".", signature)
    assert not verified(ALICE, MESSAGE, signature)
    assert verified(ADDRESS, MESSAGE, sign(b"<Bytes>" + MESSAGE + b"</Bytes>"))  # as wallets sign


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "0x",
        "0x" + "00" * 64,
        "0x" + "ff" * 64,
        "0x" + "zz" * 64,
        "00" * 65,
        "0x" + "00" * 63,
        "0x" + " " * 128,
    ],
)
def test_what_can_be_no_signature_is_none(signature: str) -> None:
    assert not verified(ADDRESS, MESSAGE, signature)
    assert not verified(ADDRESS, MESSAGE, sign(MESSAGE)[2:])  # upstream's own library fails on this one
    assert not verified("nobody", MESSAGE, sign(MESSAGE))


@given(st.binary(min_size=64, max_size=64))
def test_random_bytes_sign_nothing(raw: bytes) -> None:
    assert not verified(ADDRESS, MESSAGE, "0x" + raw.hex())
