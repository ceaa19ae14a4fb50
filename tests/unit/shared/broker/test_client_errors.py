from __future__ import annotations

import ssl

import pytest

from shared.broker.client_errors import refusal
from shared.settings_sources import load_settings

SETTINGS = load_settings({}, nats_url="nats://broker:4222", nats_ca_file="/keys/ca.crt")


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("WRONG_VERSION_NUMBER", "doesn't speak TLS, and PODIUM_NATS_CA_FILE asks for it"),
        ("RECORD_LAYER_FAILURE", "doesn't speak TLS, and PODIUM_NATS_CA_FILE asks for it"),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "handshake with the broker at nats://broker:4222 failed"),
    ],
)
def test_a_failed_handshake_says_what_failed(reason: str, says: str) -> None:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    found = refusal(error, SETTINGS, None)
    assert found is not None
    assert says in found


def test_other_errors_are_no_refusals() -> None:
    assert refusal(ConnectionResetError("gone"), SETTINGS, None) is None
