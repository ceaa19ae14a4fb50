"""Explain errors of the client library to operators, in one line with what to do."""

from __future__ import annotations

import re
import ssl
from typing import Final

from msgspec import Struct

from shared.broker.credentials import NOBODY, Identity
from shared.settings import Settings

PLAIN_TEXT: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")  # in place of TLS, by OpenSSL's version
AUTHORIZATION: Final = "authorization violation"
_DENIAL = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"', re.IGNORECASE)


class Denial(Struct, frozen=True):
    """Something the broker did not let this user do; its subject is in lower case, as the library has it."""

    action: str
    subject: str

    def explain(self, user: str) -> str:
        """Explain it to an operator: who, what, and what to do."""
        verb = "publish to" if self.action == "publish" else "listen on"
        return (
            f"the broker doesn't let user {user} {verb} {self.subject}: recreate its users with "
            "`podium keys` and reload it (SIGHUP), or see docs/security.md for what each user may do"
        )


def denial(error: Exception) -> Denial | None:
    """Return the permission violation that the broker reported, if `error` is one."""
    found = _DENIAL.search(str(error))
    return Denial(found[1].lower(), found[2]) if found else None


def refusal(error: Exception, settings: Settings, identity: Identity | None) -> str | None:
    """Return why the broker refuses these settings, if `error` is a refusal; None for a passing error."""
    url = settings.nats_url
    if AUTHORIZATION in str(error).lower():
        if identity is None:
            return (
                f"the broker at {url} wants a key: set PODIUM_NATS_NKEY_SEED_FILE (`podium keys` makes it), "
                "or PODIUM_DATA_DIR to the folder of the `podium up` that runs it"
            )
        whose = "the key" if identity.user == NOBODY else f"the key of {identity.user}"
        return (
            f"the broker at {url} doesn't know {whose} in {settings.nats_nkey_seed_file}: "
            "reload the broker (SIGHUP) if the key is new, else take the one that its users file names"
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        if settings.nats_ca_file is None:
            return f"the broker at {url} wants TLS: set PODIUM_NATS_CA_FILE (`podium keys` makes it)"
        return (
            f"the certificate of the broker at {url} does not verify with {settings.nats_ca_file}: "
            f"{error.verify_message}"
        )
    if isinstance(error, ssl.SSLError) and settings.nats_ca_file is not None:
        if error.reason in PLAIN_TEXT:
            return f"the broker at {url} doesn't speak TLS, and PODIUM_NATS_CA_FILE asks for it"
        return f"the TLS handshake with the broker at {url} failed ({error.reason or error})"
    return None
