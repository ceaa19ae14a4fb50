"""The dashboard over HTTP: open to everyone, as it holds nothing; unchanged files are not sent again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.dashboard.pages import STATIC


async def test_the_page_has_a_strict_policy(api: Any) -> None:
    async with api.client.get("/") as response:
        assert (response.status, response.content_type) == (200, "text/html")
        policy = response.headers["Content-Security-Policy"]
        assert await response.text() == (STATIC / "index.html").read_text()
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("name", "kind"),
    [("main.js", "text/javascript"), ("dashboard.css", "text/css"), ("uplot.js", "text/javascript")],
)
async def test_a_current_copy_is_not_sent_again(api: Any, name: str, kind: str) -> None:
    async with api.client.get(f"/dashboard/{name}") as response:
        assert (response.status, response.content_type) == (200, kind)
        assert response.headers["Content-Encoding"] == "gzip"
        tag = response.headers["ETag"]
        assert len(await response.read()) > 100
    async with api.client.get(f"/dashboard/{name}", headers={"If-None-Match": tag}) as response:
        assert (response.status, await response.read()) == (304, b"")
    async with api.client.get(f"/dashboard/{name}", headers={"Accept-Encoding": "identity"}) as response:
        assert "Content-Encoding" not in response.headers


@pytest.mark.parametrize("name", ["none.js", "..%2Fpages.py", "pages.py", "%2E%2E%2Fpages.py"])
async def test_nothing_else_is_served(api: Any, name: str) -> None:
    assert (await api.get(f"/dashboard/{name}"))[0] == 404


async def test_the_page_needs_no_token_and_its_data_does(start_gateway: Any, tmp_path: Path) -> None:
    (tmp_path / "api.token").write_text("operator: 0123456789abcdef0123\n")
    async with start_gateway(api_token_file=str(tmp_path / "api.token")) as api:
        async with api.client.get("/") as response:
            assert response.status == 200
        for path in ("/v1/alerts", "/v1/decisions", "/v1/days", "/v1/tasks/t/progress"):
            assert (await api.get(path))[0] == 401
