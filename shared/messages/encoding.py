"""How messages are encoded."""

from __future__ import annotations

import msgspec
from msgspec import Struct


def encode(message: Struct) -> bytes:
    """Encode one message as JSON bytes."""
    return msgspec.json.encode(message)
