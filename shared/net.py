"""A TCP port for a service that is about to start."""

from __future__ import annotations

import itertools
import random
import socket
from typing import Final

# Below the range from which Linux takes the ports of outgoing connections (32768 and up): otherwise another
# process's connection may take the port before the service listens, or while it starts again.
LOWEST: Final = 15_000
HIGHEST: Final = 32_000

# One after the other, so that a process never gets a port twice; from anywhere, so that two processes differ.
_turn = itertools.count(random.SystemRandom().randrange(HIGHEST - LOWEST))


def free_port() -> int:
    """A port on loopback that nobody listens on now. Raises OSError if there is none."""
    for _ in range(LOWEST, HIGHEST):
        port = LOWEST + next(_turn) % (HIGHEST - LOWEST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {LOWEST} and {HIGHEST}")
