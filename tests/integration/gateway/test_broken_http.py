"""What comes over HTTP and is hardly that: answered 4xx, and no event for operators."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from typing import Any

import pytest

HEAD = "POST /task_offer/ HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SENT = [
    ("gzip that is none", b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"),
    ("an encoding nobody knows", b"Content-Encoding: br\r\nContent-Length: 2\r\n\r\n{}"),
    ("a chunk without a size", b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n"),
    ("a length that is none", b"Content-Length: -1\r\n\r\n{}"),
    ("a huge header", b"X-Large: " + b"x" * 20_000 + b"\r\n\r\n"),
]


async def connected(api: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    url = api.client._base_url
    return await asyncio.open_connection(url.host, url.port)


@pytest.mark.parametrize(("what", "rest"), SENT, ids=[what for what, _ in SENT])
async def test_broken_requests_are_the_clients_fault(
    api: Any, what: str, rest: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await connected(api)
    writer.write(HEAD.encode() + rest)
    status = int((await asyncio.wait_for(reader.readline(), 10)).split()[1])
    writer.close()
    assert 400 <= status < 500
    assert (await api.get("/healthz"))[0] == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_client_that_leaves_amid_its_body_leaves_no_trace(
    api: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    _, writer = await connected(api)
    writer.write(HEAD.encode() + b"Content-Length: 500\r\n\r\n{")
    await writer.drain()
    await asyncio.sleep(0.1)
    writer.close()
    await writer.wait_closed()
    await asyncio.sleep(0.1)
    assert (await api.get("/healthz"))[0] == 200
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    said = capsys.readouterr()
    assert "a request failed" not in said.out + said.err


async def test_a_body_is_what_came_over_the_wire(api: Any, make_offer: Any) -> None:
    """A signature is of the bytes on the wire, and a small body can't become a large one here."""
    packed = gzip.compress(json.dumps(make_offer("one")).encode())
    async with api.client.post(
        "/v1/offers", data=packed, headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}
    ) as response:
        assert response.status == 400
        assert "JSON" in (await response.json(content_type=None))["detail"]
