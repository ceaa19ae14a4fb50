"""Serve the dashboard at `/`: static files of this package, and uPlot from its own package.

The files hold nothing about jobs: the page asks /v1 for that, with the token that the operator enters. They
are read on the first request, compressed once, and answered with 304 while a browser's copy is current.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from aiohttp import web
from msgspec import Struct

STATIC: Final = Path(__file__).parent / "static"
PREFIX: Final = "/dashboard/"
PAGE: Final = "index.html"
TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# uPlot's own files, by the name under which the page asks for them. Its package is never imported: that would
# import numpy and IPython, which a gateway has no use for.
PLOT_PACKAGE: Final = "uplot"
PLOT_FILES: Final = {"uplot.js": "static/uPlot.iife.js", "uplot.css": "static/uPlot.min.css"}
NO_PLOTS: Final = {
    "uplot.js": b'"use strict"; // the package uplot-python is not installed: the page shows no curves\n',
    "uplot.css": b"",
}
HEADERS: Final = {
    # No inline script or style, no other host, no frame around the page: nobody can lay it under a click.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class StaticFile(Struct, frozen=True):
    """One file as it is sent."""

    content_type: str
    body: bytes
    compressed: bytes
    tag: str


def load_files() -> dict[str, StaticFile]:
    """Return every file by its name. Blocks."""
    contents = {path.name: path.read_bytes() for path in STATIC.iterdir() if path.suffix in TYPES}
    return {name: _static_file(name, body) for name, body in (contents | plot_files()).items()}


def plot_files() -> dict[str, bytes]:
    """Return uPlot's files, or empty ones without its package: the page then shows no curves."""
    spec = find_spec(PLOT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = {name: Path(folder) / path for name, path in PLOT_FILES.items()}
        if all(path.is_file() for path in found.values()):
            return {name: path.read_bytes() for name, path in found.items()}
    return dict(NO_PLOTS)


def add_pages(app: web.Application) -> None:
    """Add the page and its files. They need no token: they reveal nothing."""
    pages = Pages()
    app.router.add_get("/", pages.get_page)
    app.router.add_get(PREFIX + "{name}", pages.get_file)


class Pages:
    """The files, read once."""

    def __init__(self) -> None:
        self._files: dict[str, StaticFile] = {}

    async def get_page(self, request: web.Request) -> web.Response:
        """Return the page."""
        return await self._answer(request, PAGE)

    async def get_file(self, request: web.Request) -> web.Response:
        """Return one of the page's files."""
        return await self._answer(request, request.match_info["name"])

    async def _answer(self, request: web.Request, name: str) -> web.Response:
        if not self._files:
            self._files = await asyncio.to_thread(load_files)
        file = self._files.get(name)
        if file is None:
            raise web.HTTPNotFound
        headers = HEADERS | {"ETag": file.tag, "Vary": "Accept-Encoding"}
        if request.headers.get("If-None-Match") == file.tag:
            return web.Response(status=304, headers=headers)
        body = file.body
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            body, headers = file.compressed, headers | {"Content-Encoding": "gzip"}
        return web.Response(body=body, content_type=file.content_type, charset="utf-8", headers=headers)


def _static_file(name: str, body: bytes) -> StaticFile:
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    return StaticFile(TYPES[Path(name).suffix], body, gzip.compress(body, mtime=0), tag)
