"""Authenticate requests of validators: fiber's rules, in fiber's order.

Pure, except for the shared nonce store, which is used last. Section 2 of upstream's contract: headers (422),
stake (403), then 401 for the nonce, the miner's address, and the signature.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Final, Protocol

from msgspec import Struct

from gateway.http_request import why_foreign
from gateway.telemetry.refusals import RefusalReason
from gateway.upstream.hotkeys import AddressError, public_key, verified
from gateway.upstream.nonces import WINDOW_S, Nonces, TooManyNoncesError
from gateway.upstream.validators import Validators
from shared.errors import SettingsError
from shared.settings import Settings

NANOSECONDS: Final = 1_000_000_000
LONGEST_NONCE: Final = 128  # upstream's have 30 characters
VALIDATOR: Final = "validator-hotkey"  # a header
USED_BEFORE: Final = "this nonce was used before"
NO_HOTKEY: Final = "this gateway has no hotkey: set PODIUM_HOTKEY to the miner's ss58 address"
OTHER_MINER: Final = "the request is addressed to another miner's hotkey"
BAD_SIGNATURE: Final = "the signature does not match the validator and this request"
LATEST_NONCE: Final = 10**20  # nanoseconds; larger ones are after this millennium; upstream's own bound


class AuthRefusal(Exception):
    """A refused request, with its status and detail; without a reason it is not a matter of who asks."""

    def __init__(self, status: int, detail: str, reason: RefusalReason | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.reason = reason


class Claims(Struct, frozen=True):
    """The headers of a signed request."""

    validator: str  # ss58 addresses
    miner: str
    nonce: str
    signature: str

    def message(self, body: bytes | None) -> bytes:
        """Return the message to sign. `body` is None for a GET: its path and query are unsigned."""
        words = [self.nonce, self.miner]
        if body is not None:
            words.append(hashlib.sha256(body).hexdigest())
        return ":".join(words).encode()


class Caller(Struct, frozen=True):
    """The validator that sent a request."""

    validator: str  # ss58 address; may be empty if signatures are off
    first: asyncio.Future[bool] | None = None  # whether no other gateway has seen this request before

    async def settle(self, patience_s: float | None = None) -> None:
        """Wait for the replay check. Call it before changing state or returning data.

        Raises AuthRefusal. After `patience_s` only this gateway's own nonces decide.
        """
        if self.first is None:
            return
        if not self.first.done():
            await asyncio.wait({self.first}, timeout=patience_s)
        if self.first.done() and not self.first.result():
            raise AuthRefusal(401, USED_BEFORE, RefusalReason.REPLAY)


class Gate(Protocol):
    """Admits or refuses requests to upstream's endpoints."""

    def admit(self, headers: Mapping[str, str], body: bytes | None, now: float) -> Caller:
        """Return the validator, if this gateway has not seen this request before. Raises AuthRefusal."""
        ...


class OpenGate:
    """Accepts unsigned requests: for a gateway on loopback whose operator turned signatures off."""

    def admit(self, headers: Mapping[str, str], body: bytes | None, now: float) -> Caller:
        """Admit requests from this machine, except what a web page could send through a browser."""
        if why := why_foreign(headers):
            advice = "set PODIUM_HOTKEY and PODIUM_UPSTREAM_AUTH=signed"
            raise AuthRefusal(403, f"{why}; {advice}", RefusalReason.FOREIGN)
        if body is not None and not headers.get("Content-Type", "").startswith("application/json"):
            raise AuthRefusal(415, "send Content-Type: application/json")
        return Caller(headers.get(VALIDATOR, ""))


class ClosedGate:
    """Refuses all requests: this gateway has no hotkey that they could be addressed to."""

    def admit(self, headers: Mapping[str, str], body: bytes | None, now: float) -> Caller:
        """Refuse the request."""
        raise AuthRefusal(403, NO_HOTKEY, RefusalReason.NO_HOTKEY)


class SignedGate:
    """Accepts signed requests of allowed validators, each once."""

    def __init__(self, hotkey: str, validators: Validators, nonces: Nonces) -> None:
        self._hotkey = hotkey
        self._validators = validators
        self._nonces = nonces

    def admit(self, headers: Mapping[str, str], body: bytes | None, now: float) -> Caller:
        """Return the signer. A refused request changes nothing, except that its nonce may be used up."""
        # As in upstream's library, an unknown validator gets 403 before any other header is checked.
        validator = read_headers(headers, VALIDATOR)[0]
        if why_not := self._validators.why_not(validator):
            reason, detail = why_not
            raise AuthRefusal(403, detail, reason)
        claims = Claims(validator, *read_headers(headers, "miner-hotkey", "nonce", "signature"))
        signed_at = nonce_time(claims.nonce)
        if signed_at is None or abs(now - signed_at) > WINDOW_S:
            raise AuthRefusal(401, _why_late(signed_at, now), RefusalReason.CLOCK)
        if self._nonces.seen(claims.validator, claims.nonce, signed_at):
            raise AuthRefusal(401, USED_BEFORE, RefusalReason.REPLAY)
        if claims.miner != self._hotkey:
            raise AuthRefusal(401, OTHER_MINER, RefusalReason.OTHER_MINER)
        if not verified(claims.validator, claims.message(body), claims.signature):
            raise AuthRefusal(401, BAD_SIGNATURE, RefusalReason.SIGNATURE)
        # Store only nonces with a valid signature: no one else can fill the store or use up a nonce.
        try:
            first = self._nonces.claim(claims.validator, claims.nonce, signed_at)
        except TooManyNoncesError as error:
            raise AuthRefusal(429, str(error), RefusalReason.TOO_MANY) from error
        if first is None:
            raise AuthRefusal(401, USED_BEFORE, RefusalReason.REPLAY)
        return Caller(claims.validator, first)


def read_headers(headers: Mapping[str, str], *names: str) -> list[str]:
    """Return the values of headers. Raises AuthRefusal 422 that names the missing ones."""
    values = [headers.get(name, "") for name in names]
    if missing := [name for name, value in zip(names, values, strict=True) if not value]:
        raise AuthRefusal(422, f"missing headers: {', '.join(missing)}")
    return values


def nonce_time(nonce: str) -> float | None:
    """Return the Unix seconds in a nonce, `<nanoseconds>_<random>`; None if it has none."""
    if len(nonce) > LONGEST_NONCE:
        return None
    digits = nonce.partition("_")[0]
    if not (digits.isascii() and digits.isdigit()) or int(digits) > LATEST_NONCE:
        return None
    return int(digits) / NANOSECONDS


def _why_late(signed_at: float | None, now: float) -> str:
    text = f"the nonce's time is not within {WINDOW_S:g} s of this gateway's clock"
    if signed_at is None:
        return text
    side = "behind" if signed_at < now else "ahead of"
    return f"{text}: it is {abs(now - signed_at):.0f} s {side} it"


def remarks(settings: Settings) -> list[str]:
    """Return warnings for the operator of a gateway that accepts signed requests."""
    if settings.hotkey is None or settings.upstream_auth == "off":
        return []
    found = []
    if not settings.upstream_validators and settings.upstream_nodes_file is None:
        found.append("no validator is allowed: set PODIUM_UPSTREAM_NODES_FILE or PODIUM_UPSTREAM_VALIDATORS")
    if settings.artifacts_kind != "hub":
        found.append(
            f"validators fetch submissions from a hub, but artifacts_kind is {settings.artifacts_kind}: set "
            "PODIUM_ARTIFACTS_KIND=hub and PODIUM_HUB_NAMESPACE for every service"
        )
    return found


def gate_of(settings: Settings, validators: Validators, nonces: Nonces) -> Gate:
    """Make the gate of the settings."""
    if settings.upstream_auth == "off":
        return OpenGate()
    if settings.hotkey is None:
        return ClosedGate()
    try:
        public_key(settings.hotkey)
    except AddressError as error:
        raise SettingsError(f"hotkey: {error}") from error
    return SignedGate(settings.hotkey, validators, nonces)
