from __future__ import annotations

import socket

from shared.net import HIGHEST, LOWEST, free_port


def test_a_free_port_can_be_listened_on_and_none_is_given_twice() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert LOWEST <= port < HIGHEST
        others = [free_port() for _ in range(200)]
        assert len({port, *others}) == 201


def test_a_taken_port_is_passed_over() -> None:
    port = free_port() + 1
    with socket.create_server(("127.0.0.1", port)):
        assert free_port() != port
