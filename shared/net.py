"""Find a free TCP port; name and recognise loopback addresses."""

from __future__ import annotations

import ipaddress
import itertools
import random
import socket
from typing import Final

BACKLOG: Final = 1024  # connections that wait to be accepted, also while the gateway starts again
LOOPBACK: Final = "127.0.0.1"
LOOPBACK_HOSTS: Final = frozenset({LOOPBACK, "::1", "localhost"})

# Below the range from which Linux takes the ports of outgoing connections (32768 and up): otherwise another
# process's connection may take the port before the service listens, or while it starts again.
LOWEST: Final = 15_000
HIGHEST: Final = 32_000

# One after the other, so that a process never gets a port twice; from anywhere, so that two processes differ.
_turn = itertools.count(random.SystemRandom().randrange(HIGHEST - LOWEST))


def free_port() -> int:
    """Return a free port on loopback. Raises OSError if there is none."""
    for _ in range(LOWEST, HIGHEST):
        port = LOWEST + next(_turn) % (HIGHEST - LOWEST)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {LOWEST} and {HIGHEST}")


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
