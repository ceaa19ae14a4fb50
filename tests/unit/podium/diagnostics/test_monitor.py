"""What doctor says of the broker's monitoring, and of something else that answers there."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import pytest

from podium.diagnostics.monitor import probe_monitor


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """The URL of a program that answers each connection with the next bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with suppress(OSError):
                for each in answers:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(each)

        thread = Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)  # nobody may ask for the rest
        thread.join(60)


def http(body: object, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{json.dumps(body)}".encode()


def test_health_and_store_are_read() -> None:
    config = {"sync_always": True, "max_storage": 100, "store_dir": "/d"}
    store = {"config": config, "stats": {"storage": 7, "memory": 0}}
    unhealthy = http({"status": "unavailable", "error": "no space"}, "503 Service Unavailable")
    with answering(unhealthy, http({"jetstream": store, "port": 4222})) as url:
        seen = probe_monitor(url, 60)
    assert seen.error is None
    assert (seen.health, seen.sync_always, seen.store_bytes, seen.store_limit) == ("no space", True, 7, 100)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "speaks no HTTP: SSH-2.0-OpenSSH_9.6"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "speaks no HTTP"),
        (http([]), "is no broker's monitoring: Expected `object`"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", "is no broker's monitoring"),
        (b'HTTP/1.1 200 OK\r\n\r\n{"status":"\xff"}', "is no broker's monitoring"),
    ],
)
def test_another_program_on_that_port_is_told(answer: bytes, said: str) -> None:
    with answering(answer, answer) as url:
        seen = probe_monitor(url, 60)
    assert seen.error is not None
    assert said in seen.error


def test_nobody_there_is_told() -> None:
    assert "refused" in (probe_monitor("http://127.0.0.1:9", 60).error or "").lower()
