"""The gateway's HTTP interface, as the commands use it."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import msgspec
from msgspec import Struct

from gateway.ledger import TaskState
from gateway.views import SlotView, TaskPage, TaskView
from shared.errors import PodiumError
from shared.messages import Decision
from shared.settings import load_settings

TIMEOUT_S = 10.0
ENDED = {TaskState.SUBMITTED, TaskState.FAILED, TaskState.EXPIRED, TaskState.CANCELLED}


class Refusal(Struct, frozen=True):
    """An error answer: the gateway took no decision."""

    status: int
    detail: str
    title: str = ""


class _Slots(Struct):
    slots: list[SlotView]


def default_url() -> str:
    """Where the settings say the gateway is."""
    settings = load_settings()
    host = "127.0.0.1" if settings.gateway_host in ("0.0.0.0", "::", "") else settings.gateway_host
    return f"http://{host}:{settings.gateway_port}"


class Client:
    """Blocking calls with a timeout; PodiumError if nobody answers."""

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise PodiumError(f"the gateway's address must be an http URL, not {url!r}")
        self.url = url.rstrip("/")

    def offer(self, body: bytes) -> Decision | Refusal:
        """Send one offer."""
        status, answer = self._request("/v1/offers", body)
        if status == 200:
            return msgspec.json.decode(answer, type=Decision)
        return _refusal(status, answer)

    def tasks(self, limit: int = 50) -> list[TaskView]:
        """The newest tasks, newest first."""
        page: TaskPage = self._get(f"/v1/tasks?limit={limit}", TaskPage)
        return page.tasks

    def slots(self) -> list[SlotView]:
        """Every slot."""
        view: _Slots = self._get("/v1/slots", _Slots)
        return view.slots

    def why_not_ready(self) -> str | None:
        """None if the gateway decides on offers now."""
        status, answer = self._request("/readyz")
        return None if status == 200 else _refusal(status, answer).detail

    def _get(self, path: str, kind: Any) -> Any:
        status, answer = self._request(path)
        if status != 200:
            refusal = _refusal(status, answer)
            raise PodiumError(f"the gateway at {self.url} answers {refusal.status}: {refusal.detail}")
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.DecodeError as error:
            raise PodiumError(f"what answers at {self.url} is no gateway: {error}") from error

    def _request(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, data=body)
        if body is not None:
            request.add_header("Content-Type", "application/json")
        try:
            # A proxy set for the outside world must not see what is said to a gateway.
            with _OPENER.open(request, timeout=TIMEOUT_S) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise PodiumError(f"no gateway at {self.url}: {reason}; is `podium up` running?") from error


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _refusal(status: int, answer: bytes) -> Refusal:
    try:
        return msgspec.json.decode(answer, type=Refusal)
    except msgspec.DecodeError:
        return Refusal(status, answer[:500].decode(errors="replace").strip() or "no text")
