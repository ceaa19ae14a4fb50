"""RFC 9457 problem details: an error with a slug for programs and a sentence for people."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import web
from msgspec import Struct

MEDIA_TYPE: Final = "application/problem+json"
PREFIX: Final = "urn:podium:problem:"

_encode = msgspec.json.Encoder().encode


class Problem(Struct, frozen=True, omit_defaults=True):
    """An error response: RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None = None  # the invalid field of the body, or the invalid parameter


def problem(
    status: int,
    slug: str,
    detail: str,
    headers: dict[str, str] | None = None,
    *,
    field: str | None = None,
) -> web.Response:
    """Make an error response. `slug` names the kind of problem for programs, `detail` says what to do."""
    message = Problem(PREFIX + slug, HTTPStatus(status).phrase, status, detail, field)
    return web.Response(body=_encode(message), status=status, headers=headers, content_type=MEDIA_TYPE)
