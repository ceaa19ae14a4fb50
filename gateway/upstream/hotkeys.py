"""Upstream's keys: ss58 addresses and sr25519 signatures."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

import base58
import sr25519

SS58_FORMAT: Final = 42  # the byte before the key: "any substrate chain"
ADDRESS_BYTES: Final = 1 + 32 + 2  # format, public key, checksum
LONGEST_ADDRESS: Final = 64  # characters; a real one has 47 or 48
SIGNATURE_BYTES: Final = 64


class AddressError(ValueError):
    """The text is not an ss58 address."""


@lru_cache(maxsize=4096)
def public_key(address: str) -> bytes:
    """Return the 32 bytes of the sr25519 public key in an ss58 address. Raises AddressError."""
    if len(address) > LONGEST_ADDRESS:
        raise AddressError("an ss58 address has 47 or 48 characters")
    try:
        raw = base58.b58decode(address)
    except ValueError as error:
        raise AddressError(f"{address!r} is not base58") from error
    if len(raw) != ADDRESS_BYTES or raw[0] != SS58_FORMAT:
        raise AddressError(f"{address!r} is not an ss58 address of format {SS58_FORMAT}")
    if raw[-2:] != _checksum(raw[:-2]):
        raise AddressError(f"{address!r} has a wrong checksum: check for a typo")
    return raw[1:-2]


def verified(address: str, message: bytes, signature: str) -> bool:
    """Return whether `signature` (`0x` and 128 hex digits) is a signature of `message` by `address`.

    Wallets wrap a message that a person signs in <Bytes>; upstream's library accepts that too.
    """
    if not signature.startswith("0x") or len(signature) != 2 + 2 * SIGNATURE_BYTES:
        return False
    try:
        raw, key = bytes.fromhex(signature[2:]), public_key(address)
        if len(raw) != SIGNATURE_BYTES:  # fromhex ignores white space
            return False
        plain: bool = sr25519.verify(raw, message, key)
        return plain or bool(sr25519.verify(raw, b"<Bytes>" + message + b"</Bytes>", key))
    except ValueError:  # an invalid address or signature
        return False


def _checksum(raw: bytes) -> bytes:
    return hashlib.blake2b(b"SS58PRE" + raw).digest()[:2]
