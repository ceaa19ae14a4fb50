"""`podium drain --wait` waits for a gateway that comes back, and ends at what doesn't change by itself."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest
from msgspec.structs import replace

from gateway.views.schemas import SlotPage, SlotView, TaskPage, TaskState, TaskView
from podium.commands import watch
from podium.commands.fleet import drain
from shared.errors import PodiumError
from shared.messages.jobs import SlotDrain
from shared.messages.offers import Decision
from shared.net import LOOPBACK

BUSY = SlotView(
    slot="a",
    state="busy",
    live=True,
    hardware=None,
    node="n",
    epoch=1,
    task="t",
    phase=None,
    step=None,
    last_heartbeat_age_s=1.0,
    drain=SlotDrain(record_id="d", slot="a", drained=True, reason="", at=1.0),
)
FREE = replace(BUSY, state="free", task=None)
OTHER = replace(FREE, slot="b")
DROP = 0


class Answers(BaseHTTPRequestHandler):
    """Answers with what is planned, in turn: the status of an error, a dropped connection, or a view."""

    planned: list[SlotView | TaskPage | int]

    def do_POST(self) -> None:
        self.answer(200, msgspec.json.encode(BUSY))

    def do_GET(self) -> None:
        match self.planned.pop(0):
            case int(status) if status == DROP:
                self.close_connection = True
            case int(status):
                self.answer(status, msgspec.json.encode({"status": status, "detail": "refused"}))
            case SlotView() as view:
                self.answer(200, msgspec.json.encode(SlotPage([view])))
            case page:
                self.answer(200, msgspec.json.encode(page))

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(drain, "POLL_S", 0.01)
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    with ThreadingHTTPServer((LOOPBACK, 0), Answers) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://{LOOPBACK}:{running.server_address[1]}"
        running.shutdown()


def drain_and_wait(url: str) -> int:
    return drain.run(argparse.Namespace(url=url, slot="a", reason="", wait=True, json=False))


def test_a_gateway_that_restarts_is_waited_for(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    Answers.planned = [BUSY, DROP, 503, BUSY, FREE]
    assert drain_and_wait(url) == 0
    told = capsys.readouterr()
    assert "slot a is drained and has no job" in told.out
    assert "waiting: no gateway at" in told.err
    assert "answered 503" in told.err
    assert Answers.planned == []


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_refusal_ends_the_wait(url: str, status: int) -> None:
    Answers.planned = [BUSY, status, FREE]
    with pytest.raises(PodiumError, match=f"answered {status}: refused"):
        drain_and_wait(url)


def test_a_slot_that_is_gone_is_named(url: str) -> None:
    Answers.planned = [BUSY, OTHER]
    with pytest.raises(PodiumError, match="slot a is not among the gateway's slots any more"):
        drain_and_wait(url)


def test_a_watch_ends_at_a_refusal_as_well(url: str) -> None:
    task = TaskView(
        task_id="t",
        task="t",
        slot="a",
        state=TaskState.SUBMITTED,
        decision=Decision(task_id="t", task="t", accepted=True, reason="r"),
        model=None,
        task_type=None,
        hours_to_complete=None,
        received_at=0.0,
        deadline_at=None,
        attempts=1,
        node=None,
        epoch=None,
        progress=None,
        result=None,
    )
    none, ended = TaskPage([], None), TaskPage([task], None)
    watched = argparse.Namespace(url=url, tasks=["t"], json=True)
    Answers.planned = [none, 503, DROP, ended]
    assert watch.run(watched) == 0
    Answers.planned = [none, 401, ended]
    with pytest.raises(PodiumError, match="answered 401"):
        watch.run(watched)


def test_a_slot_whose_task_is_stuck_is_not_waited_for(url: str) -> None:
    Answers.planned = [BUSY, BUSY, replace(BUSY, damaged="invalid JSON"), FREE]
    with pytest.raises(PodiumError, match=r"t \(busy\) is stuck: .* can't be read \(invalid JSON\)"):
        drain_and_wait(url)
