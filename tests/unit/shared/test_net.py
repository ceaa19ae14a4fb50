from __future__ import annotations

import socket

from shared.net import HIGHEST, LOOPBACK, LOOPBACK_HOSTS, LOWEST, free_port, is_loopback


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


def test_loopback_hosts_are_loopback() -> None:
    assert LOOPBACK in LOOPBACK_HOSTS
    assert all(host == "localhost" or is_loopback(host) for host in LOOPBACK_HOSTS)
    assert [is_loopback(host) for host in ("::ffff:127.0.0.1", "0.0.0.0", "example.com")] == [
        True,
        False,
        False,
    ]
