"""Client of the gateway's HTTP interface, for the commands."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import msgspec
from msgspec import Struct

from gateway.api.tokens import Token, own_token
from gateway.views.run import RunView
from gateway.views.schemas import (
    LONGEST_PAGE,
    GatewayInfo,
    ScoresTaken,
    SlotPage,
    SlotView,
    TablesView,
    TaskPage,
    TaskRecords,
    TaskState,
    TaskView,
)
from shared.errors import PodiumError
from shared.messages.encoding import decode
from shared.messages.offers import Decision
from shared.net import LOOPBACK
from shared.settings_sources import load_settings

TIMEOUT_S = 10.0
OPERATION_S = 40.0  # the gateway waits 30 s for a node, which may first have to end its worker
SCORES_S = 60.0  # each of a hundred scores is synced to the broker's disk
ENDED = {TaskState.SUBMITTED, TaskState.FAILED, TaskState.EXPIRED, TaskState.CANCELLED}


def is_over(task: TaskView) -> bool:
    """Return whether nothing more will come of a task: it has ended, or its states are damaged."""
    return task.state in ENDED or task.damaged is not None


def refuse_damaged(tasks: Iterable[TaskView]) -> None:
    """Raise PodiumError if the states of one of these tasks are damaged: nobody knows how it ends."""
    if found := [stuck(task.task, task.state, task.damaged) for task in tasks if task.damaged is not None]:
        raise PodiumError("; ".join(found))


def stuck(task: str, state: str, damaged: str) -> str:
    """Return what is wrong with a task whose states are damaged."""
    return (
        f"{task} ({state}) is stuck: the newest record of its states can't be read ({damaged}); "
        "see `podium doctor`"
    )


class Refusal(Struct, frozen=True):
    """An error response: the gateway made no decision."""

    status: int
    detail: str
    title: str = ""


def default_url() -> str:
    """Return the gateway's URL from the settings."""
    settings = load_settings()
    host = LOOPBACK if settings.gateway_host in ("0.0.0.0", "::", "") else settings.gateway_host
    return f"http://{host}:{settings.gateway_port}"


def find_gateway(url: str | None = None) -> Client:
    """Return a client of the gateway at `url` (default: the settings' one), with the settings' token."""
    return Client(url or default_url(), own_token(load_settings()))


class GatewayAwayError(PodiumError):
    """No gateway answers, or it can't at the moment: one that restarts does later."""


class NotFoundError(PodiumError):
    """The gateway knows no such thing."""


_ERRORS: dict[int, type[PodiumError]] = {
    HTTPStatus.SERVICE_UNAVAILABLE: GatewayAwayError,
    HTTPStatus.NOT_FOUND: NotFoundError,
}


class Client:
    """Blocking calls with a timeout. Raises PodiumError if the gateway doesn't answer."""

    def __init__(self, url: str, token: Token | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise PodiumError(f"the gateway's address must be an http URL, not {url!r}")
        self.url = url.rstrip("/")
        self._token = token

    def offer(self, body: bytes) -> Decision | Refusal:
        """Send one offer."""
        status, answer = self._request("/v1/offers", body)
        if status == 200:
            return decode(answer, Decision)
        return _refusal(status, answer)

    def tasks(self, limit: int = 50, *, states: str = "", slot: str | None = None) -> list[TaskView]:
        """Return the newest tasks, newest first, filtered by `states` (comma-separated) and `slot`."""
        query: dict[str, str | int] = {"state": states}
        if slot:
            query["slot"] = slot
        found: list[TaskView] = []
        while len(found) < limit:
            query["limit"] = min(limit - len(found), LONGEST_PAGE)
            page: TaskPage = self._get(f"/v1/tasks?{urllib.parse.urlencode(query)}", TaskPage)
            found += page.tasks
            if page.next is None:
                break
            query["after"] = page.next
        return found

    def task(self, task_id: str) -> TaskView:
        """Return one task. Raises NotFoundError if none of this id was accepted."""
        view: TaskView = self._get(_path(task_id), TaskView)
        return view

    def progress(self, task_id: str, points: int = 2000, after: float = 0.0) -> RunView:
        """Return the course of a task's run later than `after`, with at most so many points of its curve."""
        query = urllib.parse.urlencode({"points": points} | ({"after": after} if after else {}))
        view: RunView = self._get(f"{_path(task_id)}/progress?{query}", RunView)
        return view

    def records(self, task_id: str) -> TaskRecords:
        """Return everything that is stored about one task."""
        records: TaskRecords = self._get(f"{_path(task_id)}/story", TaskRecords)
        return records

    def cancel(self, task_id: str, reason: str) -> TaskView:
        """End a task as cancelled. Raises PodiumError with the reason if that is refused."""
        return self._operate(task_id, "cancel", reason)

    def requeue(self, task_id: str, reason: str) -> TaskView:
        """Restart a job. Raises PodiumError with the reason if that is refused."""
        return self._operate(task_id, "requeue", reason)

    def drain(self, slot: str, reason: str) -> SlotView:
        """Give a slot no new job. Raises PodiumError with the reason if that is refused."""
        return self._operate_slot(slot, "drain", reason)

    def resume(self, slot: str, reason: str) -> SlotView:
        """Let a drained slot get jobs again. Raises PodiumError with the reason if that is refused."""
        return self._operate_slot(slot, "resume", reason)

    def gateway(self) -> GatewayInfo:
        """Return the gateway's settings and state."""
        info: GatewayInfo = self._get("/v1/gateway", GatewayInfo)
        return info

    def post_scores(self, forms: list[dict[str, Any]]) -> ScoresTaken:
        """Post upstream's scores; return what happened to each."""
        body = json.dumps(forms).encode()  # the standard library's, as a form may hold NaN
        taken: ScoresTaken = self._get("/v1/scores", ScoresTaken, body, timeout_s=SCORES_S)
        return taken

    def tables(self) -> TablesView:
        """Return the learned rates."""
        view: TablesView = self._get("/v1/tables", TablesView)
        return view

    def slots(self) -> list[SlotView]:
        """Return every slot."""
        page: SlotPage = self._get("/v1/slots", SlotPage)
        return page.slots

    def why_not_ready(self) -> str | None:
        """Return None if the gateway can decide on offers now, else the reason."""
        status, answer = self._request("/readyz")
        return None if status == 200 else _refusal(status, answer).detail

    def _operate(self, task_id: str, operation: str, reason: str) -> TaskView:
        body = msgspec.json.encode({"reason": reason} if reason else {})
        path = f"{_path(task_id)}/{operation}"
        task: TaskView = self._get(path, TaskView, body, timeout_s=OPERATION_S)
        return task

    def _operate_slot(self, slot: str, operation: str, reason: str) -> SlotView:
        body = msgspec.json.encode({"reason": reason} if reason else {})
        path = f"/v1/slots/{urllib.parse.quote(slot, safe='')}/{operation}"
        view: SlotView = self._get(path, SlotView, body)
        return view

    def _get(self, path: str, kind: Any, body: bytes | None = None, *, timeout_s: float = TIMEOUT_S) -> Any:
        status, answer = self._request(path, body, timeout_s)
        if status != 200:
            refusal = _refusal(status, answer)
            failure = _ERRORS.get(status, PodiumError)
            raise failure(f"the gateway at {self.url} answered {refusal.status}: {refusal.detail}")
        try:
            return decode(answer, kind)
        except ValueError as error:
            raise PodiumError(f"the server at {self.url} is not a gateway: {error}") from error

    def _request(
        self, path: str, body: bytes | None = None, timeout_s: float = TIMEOUT_S
    ) -> tuple[int, bytes]:
        request = urllib.request.Request(self.url + path, data=body)
        if body is not None:
            request.add_header("Content-Type", "application/json")
        if self._token is not None:  # never sent on to the target of a redirect
            request.add_unredirected_header("Authorization", f"Bearer {self._token.secret}")
        try:
            return fetch(request, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            what = f"no gateway at {self.url}: {reason}; is `podium up` running?"
            raise GatewayAwayError(what) from error


# Without proxies: what is sent to the gateway or the broker must not pass one that is set for the internet.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(request: urllib.request.Request | str, timeout_s: float) -> tuple[int, bytes]:
    """Return an answer's status and body, whatever the status. Raises OSError and HTTPException. Blocks."""
    try:
        with _OPENER.open(request, timeout=timeout_s) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def _path(task_id: str) -> str:
    return f"/v1/tasks/{urllib.parse.quote(task_id, safe='')}"


def _refusal(status: int, answer: bytes) -> Refusal:
    try:
        return decode(answer, Refusal)
    except ValueError:
        return Refusal(status, answer[:500].decode(errors="replace").strip() or "empty response")
