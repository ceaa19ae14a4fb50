"""What an operator does on the dashboard, behind the token: drain a slot, requeue and cancel a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gateway.api.tokens import Token
from podium.client import Client
from shared.messages.offers import Decision

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

SECRET = "0123456789abcdef0123"
TASK = "steered"

pytestmark = [pytest.mark.browser, pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def machine(
    browser: Browser, machine_with: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder = tmp_path_factory.mktemp("actions")
    (folder / "api.token").write_text(f"operator: {SECRET}\n")
    (folder / "api.token").chmod(0o600)
    machine = machine_with(folder, PODIUM_API_TOKEN_FILE=str(folder / "api.token"))
    machine.up()
    return machine


@pytest.fixture
def client(machine: Any) -> Client:
    return Client(machine.url, Token(SECRET))


def press(page: Page, name: str, questions: list[str]) -> None:
    """Click as a hand does, until the page asks: it holds the button while the page is drawn again.

    Several times, as an alert that comes or goes meanwhile moves the button away from the hand.
    """
    asked = len(questions)
    for _ in range(5):
        box = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.wait_for_timeout(600)
        page.mouse.up()
        page.wait_for_timeout(300)
        if len(questions) > asked:
            return
    raise AssertionError(f"{name} was not clicked in five tries")


def test_an_operator_with_the_token_drains_requeues_and_cancels(
    machine: Any, browser: Browser, client: Client
) -> None:
    page, questions = browser.new_page(), list[str]()
    page.goto(machine.url)
    page.locator("#token-dialog").wait_for()  # its data needs the token
    assert page.get_by_role("button", name="Drain slot a").count() == 0
    page.locator("#token-field").fill(SECRET)
    page.get_by_role("button", name="Use it").click()
    page.get_by_role("button", name="Drain slot a").wait_for()

    def answer(dialog: Dialog) -> None:
        questions.append(dialog.message)
        if len(questions) == 1:  # the first question is answered with no
            dialog.dismiss()
        else:
            dialog.accept()

    page.on("dialog", answer)
    press(page, "Drain slot a", questions)
    page.wait_for_timeout(500)
    assert [slot.drain for slot in client.slots()] == [None, None]
    press(page, "Drain slot a", questions)
    page.locator("#card-a").get_by_text("drained: it gets no new job").wait_for()
    drain = client.slots()[0].drain
    assert drain is not None
    assert drain.reason == "requested on the dashboard"
    page.get_by_text("slot a has been drained for").wait_for()

    decision = client.offer(json.dumps(machine.fields(TASK)).encode())
    assert isinstance(decision, Decision)
    assert (decision.accepted, decision.slot) == (True, "b"), decision
    page.goto(f"{machine.url}/#/task/{TASK}")
    machine.until(lambda: client.task(TASK).state == "running", "the task runs")
    page.get_by_role("button", name="Requeue").wait_for()
    press(page, "Requeue", questions)
    page.get_by_text("requeue: done, the task is running").wait_for()
    press(page, "Cancel task", questions)
    page.get_by_text("cancelled").first.wait_for()
    machine.until(lambda: client.task(TASK).state == "cancelled", "the task is cancelled")

    page.goto(f"{machine.url}/#/")
    press(page, "Resume slot a", questions)
    page.get_by_role("button", name="Drain slot a").wait_for()
    assert client.slots()[0].drain is None
    assert len(questions) == 5
    page.close()


def test_a_slot_that_is_drained_by_a_command_is_shown_at_once(
    machine: Any, browser: Browser, client: Client, tmp_path: Path
) -> None:
    page = browser.new_page()
    page.goto(machine.url)
    page.locator("#token-field").fill(SECRET)
    page.get_by_role("button", name="Use it").click()
    page.locator("#link.live").wait_for()
    assert machine.podium("drain", "b", "--reason", "fan is loud").returncode == 0
    page.locator("#card-b").get_by_text("fan is loud").wait_for(timeout=5000)
    assert machine.podium("resume", "b").returncode == 0
    page.locator("#card-b").get_by_text("fan is loud").wait_for(state="detached", timeout=5000)
    page.close()
