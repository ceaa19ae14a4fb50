from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gateway.operations import ANSWER_S
from podium.client import OPERATION_S, TIMEOUT_S, fetch
from shared.net import LOOPBACK, free_port


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = int(self.path[1:])
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"body of %d" % status)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer((LOOPBACK, 0), Answers) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://{LOOPBACK}:{running.server_address[1]}"
        running.shutdown()


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_body_comes_with_any_status_and_past_every_proxy(
    server: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://{LOOPBACK}:{free_port()}")  # nobody listens there
    assert fetch(f"{server}/{status}", 5.0) == (status, b"body of %d" % status)


def test_no_answer_is_an_os_error() -> None:
    with pytest.raises(OSError, match="refused"):
        fetch(f"http://{LOOPBACK}:{free_port()}/200", 5.0)


def test_an_operation_waits_longer_than_the_gateway_does() -> None:
    assert OPERATION_S >= ANSWER_S + TIMEOUT_S
