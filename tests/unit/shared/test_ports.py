from __future__ import annotations

import socket

from shared.ports import HIGHEST, LOWEST, free_port


def test_a_free_port_can_be_listened_on_and_a_taken_one_is_not_given() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert LOWEST <= port < HIGHEST
        assert port not in {free_port() for _ in range(200)}
