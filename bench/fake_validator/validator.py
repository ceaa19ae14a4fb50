"""Upstream's validator as a miner sees it, written from the protocol alone: keys, headers, calls.

A request has four headers: the signer (`validator-hotkey`), the addressee (`miner-hotkey`), a `nonce` of
nanoseconds and ten characters, and an sr25519 `signature` of `nonce:miner[:sha256 of the body]`. The bytes
sent are the bytes signed. This module uses no code of the gateway.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
import time
from typing import Any

import aiohttp
import base58
import sr25519
from msgspec import Struct

OFFER, OFFER_IMAGE = "/task_offer/", "/task_offer_image/"
START, START_GRPO, START_IMAGE = "/start_training/", "/start_training_grpo/", "/start_training_image/"
SUBMISSION, REPO = "/get_latest_model_submission/", "/training_repo/"
OFFER_TIMEOUT_S, OTHER_TIMEOUT_S = 3.0, 10.0
VALIDATOR, MINER, NONCE, SIGNATURE = "validator-hotkey", "miner-hotkey", "nonce", "signature"
SUBSTRATE = 42  # the address type of Bittensor
NONCE_LETTERS = string.ascii_letters + string.digits


class Keys(Struct, frozen=True):
    """An sr25519 key pair and its ss58 address."""

    public: bytes
    secret: bytes
    address: str

    def sign(self, message: str) -> str:
        """Return a signature as it stands in the header."""
        signature: bytes = sr25519.sign((self.public, self.secret), message.encode())
        return "0x" + signature.hex()


class Reply(Struct, frozen=True):
    """A response: the status, the JSON body or None, and the seconds it took."""

    status: int
    body: Any
    seconds: float


def keys_from_seed(seed: str) -> Keys:
    """Return the key pair of a name; the same name gives the same keys."""
    public, secret = sr25519.pair_from_seed(hashlib.sha256(seed.encode()).digest())
    return Keys(public, secret, ss58(public))


def ss58(public: bytes, kind: int = SUBSTRATE) -> str:
    """Return the address of a public key: base58 of type, key and two bytes of blake2b."""
    payload = bytes([kind]) + public
    checksum = hashlib.blake2b(b"SS58PRE" + payload).digest()[:2]
    return base58.b58encode(payload + checksum).decode()


def new_nonce(at_ns: int | None = None) -> str:
    """Return a nonce of now, or of another moment."""
    letters = "".join(random.choices(NONCE_LETTERS, k=10))
    return f"{time.time_ns() if at_ns is None else at_ns}_{letters}"


def signed_headers(keys: Keys, miner: str, body: bytes | None, nonce: str | None = None) -> dict[str, str]:
    """Return the headers of one request; without a body it is a GET, which signs nonce and miner only."""
    nonce = nonce or new_nonce()
    message = f"{nonce}:{miner}"
    if body is not None:
        message += f":{hashlib.sha256(body).hexdigest()}"
    return {
        "Content-Type": "application/json",
        VALIDATOR: keys.address,
        MINER: miner,
        NONCE: nonce,
        SIGNATURE: keys.sign(message),
    }


def request_bytes(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """Return one HTTP/1.1 request as it goes over the wire, for clients that write to sockets."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Validator:
    """A validator with its keys, calling one miner; `keys=None` sends unsigned requests."""

    def __init__(self, session: aiohttp.ClientSession, keys: Keys | None, miner: str = "") -> None:
        self.session = session
        self.keys = keys
        self.miner = miner

    async def offer(self, offer: dict[str, Any]) -> Reply:
        """Ask whether a task would be taken; an image task goes to the path of its own."""
        path = OFFER_IMAGE if offer.get("task_type") == "ImageTask" else OFFER
        return await self.post(path, offer, OFFER_TIMEOUT_S)

    async def start(self, path: str, request: dict[str, Any]) -> Reply:
        """Send the data of an accepted task."""
        return await self.post(path, request, OTHER_TIMEOUT_S)

    async def submission(self, task_id: str) -> Reply:
        """Ask where a task's model is."""
        return await self.get(SUBMISSION + task_id)

    async def post(self, path: str, payload: Any, timeout_s: float = OTHER_TIMEOUT_S) -> Reply:
        """Send a signed POST of one JSON value, as Python's json writes it."""
        body = json.dumps(payload).encode()
        headers = self._headers(body)
        return await self.send("POST", path, headers, body, timeout_s)

    async def get(self, path: str, timeout_s: float = OTHER_TIMEOUT_S) -> Reply:
        """Send a signed GET."""
        return await self.send("GET", path, self._headers(None), None, timeout_s)

    async def send(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes | None,
        timeout_s: float = OTHER_TIMEOUT_S,
    ) -> Reply:
        """Send exactly this; no redirect is followed, as upstream follows none."""
        began = time.perf_counter()
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with self.session.request(
            method, path, data=body, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            raw = await response.read()
        seconds = time.perf_counter() - began
        try:
            return Reply(response.status, json.loads(raw), seconds)
        except ValueError:
            return Reply(response.status, None, seconds)

    def _headers(self, body: bytes | None) -> dict[str, str]:
        if self.keys is None:
            return {"Content-Type": "application/json"}
        return signed_headers(self.keys, self.miner, body)


def accepted(reply: Reply) -> bool:
    """Return whether upstream counts a response as accepted: only an unambiguous one."""
    body = reply.body
    return (
        reply.status == 200
        and isinstance(body, dict)
        and isinstance(body.get("message", ""), str)
        and body.get("accepted", False) is True
    )
