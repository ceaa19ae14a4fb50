"""Downloads from a local server over real sockets: what may be fetched, and what happens when it breaks."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shared.errors import DataError, DataUnavailableError
from shared.messages.offers import FileFormat
from shared.messages.runs import ErrorCode
from trainer_node.engine.data import download
from trainer_node.engine.data.download import fetch, is_public, public_name
from trainer_node.engine.data.sources import read_rows

BODY = b'[{"text": "one"}, {"text": "two"}]'


class Handler(BaseHTTPRequestHandler):
    """Answers by path; counts the requests for each."""

    seen: dict[str, int] = {}

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        Handler.seen[path] = Handler.seen.get(path, 0) + 1
        if path == "/moved":
            self.answer(302, b"", location="/data.json?X-Amz-Signature=secret")
        elif path == "/inside":
            self.answer(302, b"", location="http://169.254.169.254/latest/meta-data")
        elif path == "/nowhere":
            self.answer(302, b"", location="http://[host/x?sig=secret")
        elif path == "/loop":
            self.answer(302, b"", location="/loop")
        elif path == "/busy" and Handler.seen[path] < 3:
            self.answer(503, b"")
        elif path == "/short":
            self.answer(200, BODY, length=len(BODY) + 10)
        elif path == "/endless":
            self.answer(200, b"x" * 5000, length=None)
        elif path.startswith("/drip/"):
            self.drip(path)
        elif path.startswith("/status/"):
            self.answer(int(path.removeprefix("/status/")), b"")
        elif path in ("/data.json", "/busy"):
            self.answer(200, BODY)
        else:
            self.answer(404, b"")

    def drip(self, path: str) -> None:
        """Send one byte every 20 ms, for 6 s at most: of the body, of the head or of a chunk's length."""
        sent = {
            "/drip/body": b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n",
            "/drip/head": b"HTTP/1.1 200 OK\r\nX-Slow: ",
            "/drip/chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        }
        self.wfile.write(sent[path])
        with contextlib.suppress(OSError):
            for _ in range(300):
                self.wfile.write(b"x")
                threading.Event().wait(0.02)

    def answer(self, status: int, body: bytes, location: str = "", length: int | None = -1) -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length == -1 else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    Handler.seen = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *(
            "::1",
            "fe80::1%eth0",
            "fd00::1",
            "::ffff:127.0.0.1",
            "64:ff9b::a00:1",
            "2002:7f00:1::",
            "224.0.0.1",
        ),
    ],
)
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


def test_shown_names_hold_no_secret() -> None:
    shown = public_name("https://user:password@host.example/path/data.json?X-Amz-Signature=secret#part")
    assert shown == "https://host.example/path/data.json"
    assert public_name("some/file.json") == "some/file.json"
    assert public_name("https://[host/x?sig=secret") == "a malformed URL"


def test_rows_from_a_url(server: str) -> None:
    rows = read_rows(f"{server}/moved", FileFormat.S3, allow_private_urls=True).rows
    assert rows == [{"text": "one"}, {"text": "two"}]


def test_a_resumed_run_needs_the_host_no_more(server: str, tmp_path: Path) -> None:
    keep = tmp_path / "data"
    rows = read_rows(f"{server}/data.json", FileFormat.JSON, allow_private_urls=True, keep=keep).rows
    again = read_rows(f"{server}/gone.json", FileFormat.JSON, allow_private_urls=True, keep=keep).rows
    assert again == rows == [{"text": "one"}, {"text": "two"}]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_broken_download_is_not_kept(server: str, tmp_path: Path) -> None:
    keep = tmp_path / "data"
    with pytest.raises(DataError, match="the connection broke"):
        read_rows(f"{server}/short", FileFormat.JSON, allow_private_urls=True, keep=keep)
    assert not keep.exists()


def test_private_hosts_are_refused_unless_allowed(server: str) -> None:
    port = server.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "[::1]", "2130706433"):
        with pytest.raises(DataError, match="private address"):
            read_rows(
                f"https://{host}:{port}/data.json?sig=secret", FileFormat.JSON, allow_private_urls=False
            )
    assert not Handler.seen


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in ("8.8.8.8", "10.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with pytest.raises(DataError, match=r"10\.0\.0\.1"):
        read_rows("https://twofaced.example/data.json", FileFormat.JSON, allow_private_urls=False)


def test_the_connection_goes_to_the_checked_address(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A name server that answers differently the second time is asked only once."""
    port = int(server.rpartition(":")[2])
    asked = []

    def resolve(host: str, *args: object, **options: object) -> list[object]:
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **o: (resolve if "example" in host else real)(host, *a, **o)
    )
    fetch(f"http://data.example:{port}/data.json", tmp_path / "data", allow_private=True)
    assert (tmp_path / "data").read_bytes() == BODY
    assert asked == ["data.example"]


def test_plain_http_is_refused(server: str) -> None:
    with pytest.raises(DataError, match="must come over https, not http"):
        read_rows(f"{server}/data.json", FileFormat.JSON, allow_private_urls=False)


def test_redirects_are_checked_again(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checked = []
    real = download.resolve

    def resolve(host: str, port: int, *, allow_private: bool) -> list[str]:
        checked.append(host)
        return real(host, port, allow_private=host == "127.0.0.1")

    monkeypatch.setattr(download, "resolve", resolve)
    with pytest.raises(DataError, match=r"169\.254\.169\.254"):
        fetch(f"{server}/inside", tmp_path / "data", allow_private=True)
    assert checked == ["127.0.0.1", "169.254.169.254"]
    with pytest.raises(DataError, match="more than 5 redirects"):
        fetch(f"{server}/loop", tmp_path / "data", allow_private=True)
    with pytest.raises(DataError, match="/nowhere redirects to a malformed URL"):
        fetch(f"{server}/nowhere", tmp_path / "data", allow_private=True)


def test_a_path_is_sent_quoted_once(server: str, tmp_path: Path) -> None:
    for path in ("/\u00e4 \u20ac.json", "/%C3%A4%20.json"):
        with pytest.raises(DataError, match="404"):
            fetch(server + path, tmp_path / "data", allow_private=True)
    assert Handler.seen["/%C3%A4%20%E2%82%AC.json"] == Handler.seen["/%C3%A4%20.json"] == 1


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server: str, tmp_path: Path) -> None:
    fetch(f"{server}/busy", tmp_path / "data", allow_private=True)
    assert Handler.seen["/busy"] == 3
    with pytest.raises(DataError, match=r"/missing: the server answers 404"):
        fetch(f"{server}/missing?sig=secret", tmp_path / "data", allow_private=True)
    assert Handler.seen["/missing"] == 1


def test_whatever_comes_is_a_sign_of_life(server: str, tmp_path: Path) -> None:
    said: list[str] = []
    fetch(f"{server}/data.json", tmp_path / "data", allow_private=True, tick=said.append)
    assert said[0].startswith("connecting to 127.0.0.1 port")
    assert said[-1] == f"0 MB of {server}/data.json downloaded"


@pytest.mark.parametrize("path", ["drip/body", "drip/head", "drip/chunk"])
def test_a_server_that_drips_bytes_outlives_no_limit(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    monkeypatch.setattr(download, "TOTAL_S", 0.6)
    said: list[str] = []
    began = time.monotonic()
    with pytest.raises(DataUnavailableError, match="not downloaded within"):
        fetch(f"{server}/{path}", tmp_path / "data", allow_private=True, tick=said.append)
    assert time.monotonic() - began < 4.0  # all that it sends takes 6 s
    assert len(said) > 5


def test_many_addresses_that_do_not_answer_outlive_no_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [0.0]

    def refuse(address: tuple[str, int], timeout: float) -> None:
        now[0] += timeout
        raise TimeoutError

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(download, "resolve", lambda *args, **options: ["8.8.8.8"] * 1000)
    monkeypatch.setattr(socket, "create_connection", refuse)
    said: list[str] = []
    with pytest.raises(DataUnavailableError, match="not downloaded within"):
        fetch("https://host.example/rows", tmp_path / "data", allow_private=False, tick=said.append)
    assert now[0] < download.TOTAL_S + 2 * download.TIMEOUT_S
    assert len(said) == now[0] / download.TIMEOUT_S + 1


def test_a_broken_download_is_an_error(server: str, tmp_path: Path) -> None:
    with pytest.raises(DataUnavailableError, match=r"short \(6 tries\)") as caught:
        fetch(f"{server}/short", tmp_path / "data", allow_private=True)
    assert caught.value.code is ErrorCode.DATA_UNAVAILABLE


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *((status, ErrorCode.BAD_DATA) for status in (404, 410)),
        *((status, ErrorCode.DATA_UNAVAILABLE) for status in (401, 403, 503)),
    ],
)
def test_only_what_nobody_can_have_is_bad_data(
    server: str, tmp_path: Path, status: int, code: ErrorCode
) -> None:
    """Others may have come before a signed URL expired, or from an address that the server serves."""
    with pytest.raises(DataError, match=f"answers {status}") as caught:
        fetch(f"{server}/status/{status}", tmp_path / "data", allow_private=True)
    assert caught.value.code is code


def test_a_host_without_an_address_is_no_bad_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_answer(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(socket, "getaddrinfo", no_answer)
    with pytest.raises(DataUnavailableError, match=r"can't resolve host\.example"):
        fetch("https://host.example/rows.json", tmp_path / "data", allow_private=False)


@pytest.mark.parametrize("path", ["data.json", "endless"])  # with and without a stated length
def test_the_size_is_capped(server: str, tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match="larger than"):
        fetch(f"{server}/{path}", tmp_path / "data", allow_private=True, max_bytes=20)


@pytest.mark.parametrize("url", ["https://", "https://host:port/x", "https:///path", "https://[host/x"])
def test_unusable_urls(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a usable URL"):
        fetch(url, tmp_path / "data", allow_private=False)
