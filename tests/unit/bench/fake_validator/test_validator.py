from __future__ import annotations

import hashlib
import re
import time

import pytest
import sr25519

from bench.fake_validator.validator import (
    Reply,
    accepted,
    keys_from_seed,
    new_nonce,
    request_bytes,
    signed_headers,
    ss58,
)

# the well-known development account of substrate
ALICE = bytes.fromhex("d43593c715fdd31c61141abd04a99fd6822c8558854ccde39a5684e7a56da27d")
KEYS, MINER = keys_from_seed("validator"), keys_from_seed("miner").address


def verified(headers: dict[str, str], message: str) -> bool:
    signature = headers["signature"]
    assert re.fullmatch(r"0x[0-9a-f]{128}", signature)
    return sr25519.verify(bytes.fromhex(signature[2:]), message.encode(), KEYS.public)


def test_addresses_are_substrates() -> None:
    assert ss58(ALICE) == "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"


def test_the_same_seed_gives_the_same_keys() -> None:
    assert keys_from_seed("a") == keys_from_seed("a") != keys_from_seed("b")


def test_a_nonce_is_of_now() -> None:
    nonce = new_nonce()
    assert re.fullmatch(r"\d{19}_[A-Za-z0-9]{10}", nonce)
    assert abs(int(nonce.partition("_")[0]) / 1e9 - time.time()) < 10


def test_a_post_signs_its_body_and_a_get_none() -> None:
    body = b'{"task_id": "x"}'
    headers = signed_headers(KEYS, MINER, body)
    assert (headers["validator-hotkey"], headers["miner-hotkey"]) == (KEYS.address, MINER)
    assert verified(headers, f"{headers['nonce']}:{MINER}:{hashlib.sha256(body).hexdigest()}")
    headers = signed_headers(KEYS, MINER, None)
    assert verified(headers, f"{headers['nonce']}:{MINER}")
    assert not verified(headers, f"{headers['nonce']}:{MINER}:{hashlib.sha256(b'').hexdigest()}")


def test_a_request_as_it_goes_over_the_wire() -> None:
    assert request_bytes("POST", "/p/", {"nonce": "1"}, b"{}") == (
        b"POST /p/ HTTP/1.1\r\nHost: 127.0.0.1\r\nnonce: 1\r\nContent-Length: 2\r\n\r\n{}"
    )


@pytest.mark.parametrize(
    ("status", "body", "yes"),
    [
        (200, {"message": "m", "accepted": True}, True),
        (200, {"accepted": True}, True),
        (200, {"message": None, "accepted": True}, False),
        (200, {"message": "m", "accepted": False}, False),
        (200, {"message": "m"}, False),
        (200, [], False),
        (307, {"message": "m", "accepted": True}, False),
        (503, {"message": "m", "accepted": True}, False),
    ],
)
def test_anything_but_a_clear_yes_is_a_no(status: int, body: object, yes: bool) -> None:
    assert accepted(Reply(status, body, 0.0)) is yes
