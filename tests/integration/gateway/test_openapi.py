"""The OpenAPI document: valid, complete, and what a live gateway really answers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from aiohttp import web
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from gateway.api.access import Guard
from gateway.api.openapi import document
from gateway.api.v1 import ROUTES, make_app
from gateway.service import Service
from shared import subjects
from shared.broker.bus import Bus
from shared.messages.encoding import encode
from shared.messages.jobs import Claimed
from shared.messages.runs import Phase, Progress
from tests.integration.gateway.test_bad_requests import BAD_FIELDS, JSON, with_field
from tests.integration.gateway.test_gateway_api import result_of
from tests.integration.gateway.test_sse import reading

MakeOffer = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return document(ROUTES, "1")


def routes_of(app: web.Application) -> set[tuple[str, str]]:
    """Method and path of every route, without the slash at the end."""
    paths = [(route.method, route.resource.canonical) for route in app.router.routes() if route.resource]
    return {(method, path.rstrip("/")) for method, path in paths}


def validate(spec: dict[str, Any], schema: dict[str, Any], value: Any) -> None:
    root = {"$schema": "https://json-schema.org/draft/2020-12/schema", "components": spec["components"]}
    errors = [error.message for error in Draft202012Validator(root | schema).iter_errors(value)]
    assert not errors, errors


def test_it_is_valid(spec: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(spec).validate()
    references = set(re.findall(r"#/components/schemas/(\w+)", str(spec)))
    assert references <= set(spec["components"]["schemas"])


def test_every_route_is_in_it_and_nothing_else(spec: dict[str, Any], gateway_settings: Any) -> None:
    service = Service(gateway_settings())
    app = make_app(service, Guard(None, loopback=True, metrics_open=False))
    described = {(method.upper(), path) for path, methods in spec["paths"].items() for method in methods}
    assert described == routes_of(app)
    identifiers = [it["operationId"] for methods in spec["paths"].values() for it in methods.values()]
    assert len(set(identifiers)) == len(identifiers)
    assert all(it["summary"] for methods in spec["paths"].values() for it in methods.values())


def test_what_is_open_is_said(spec: dict[str, Any]) -> None:
    opened = {path for path, methods in spec["paths"].items() if methods.get("get", {}).get("security") == []}
    assert opened == {"/healthz", "/readyz", "/v1/openapi.json", "/v1/docs"}


class Checked:
    """Requests whose answers must be as the document says, whatever they are."""

    def __init__(self, api: Any, spec: dict[str, Any]) -> None:
        self.api, self.spec = api, spec
        self.seen: set[tuple[str, str, int]] = set()

    async def ask(self, method: str, template: str, path: str = "", **options: Any) -> Any:
        async with self.api.client.request(method, path or template, **options) as response:
            answers = self.spec["paths"][template][method.lower()]["responses"]
            assert str(response.status) in answers, (method, path, response.status)
            content = answers[str(response.status)]["content"]
            assert response.content_type in content, (path, response.content_type)
            self.seen.add((method, template, response.status))
            if not response.content_type.endswith("json"):
                return await response.text()
            body = await response.json(content_type=None)
            validate(self.spec, content[response.content_type]["schema"], body)
            return body


async def test_a_live_gateway_answers_as_it_says(
    api: Any, bus: Bus, make_offer: MakeOffer, spec: dict[str, Any]
) -> None:
    ask = Checked(api, spec).ask
    task, story = "/v1/tasks/{task_id}", "/v1/tasks/{task_id}/story"
    cancel, requeue = f"{task}/cancel", f"{task}/requeue"
    validate(spec, {"$ref": "#/components/schemas/Offer"}, make_offer("one"))
    bodies: list[Any] = [make_offer("one"), make_offer("long", hours_to_complete=97), {"task_id": "x"}, []]
    for body in bodies:
        await ask("POST", "/v1/offers", json=body)
    await ask("POST", "/v1/offers", data=b"{}", headers={"Content-Type": "text/plain"})
    await ask("POST", "/v1/offers", data=io.BytesIO(b" " * (2 << 20)), headers=JSON)
    claimed = Claimed(record_id="r", task="one", slot="a", node="n", epoch=1, attempt=1)
    last = await bus.append(subjects.state_stream("a"), subjects.state("a", "one"), encode(claimed))
    await bus.publish(
        subjects.progress("a", "one"), encode(Progress(task="one", slot="a", phase=Phase.TRAIN))
    )
    await api.until("/v1/tasks/one", lambda body: body["state"] == "running" and body["progress"])
    await ask("GET", "/v1/slots")
    await ask("POST", requeue, "/v1/tasks/one/requeue", json={"reason": "why"})  # no node is there
    await ask("POST", requeue, "/v1/tasks/none/requeue", json={})
    await ask("POST", cancel, "/v1/tasks/one/cancel", json={"reason": 7})
    await ask("GET", task, "/v1/tasks/one")
    await api.offer(make_offer("two"))
    await result_of(bus, "a", "one", last)
    await api.until("/v1/tasks/one", lambda body: body["state"] == "submitted")
    await ask("POST", cancel, "/v1/tasks/one/cancel", json={})
    await ask("POST", cancel, "/v1/tasks/two/cancel", json={})
    for path in ("/v1/tasks", "/v1/tasks?limit=1", "/v1/tasks?state=cancelled&slot=b", "/v1/tasks?limit=x"):
        await ask("GET", "/v1/tasks", path)
    await ask("GET", task, "/v1/tasks/none")
    await ask("GET", story, "/v1/tasks/one/story")
    await ask("GET", story, "/v1/tasks/one/story", headers={"Host": "evil.example"})
    for path in ("/v1/gateway", "/metrics", "/healthz", "/readyz", "/v1/openapi.json", "/v1/docs"):
        await ask("GET", path)
    await ask("GET", "/v1/events", "/v1/events?types=none")
    async with reading(api, "?after=0") as reader:
        await api.offer(make_offer("three"))  # decisions are only followed while someone reads
        events = spec["paths"]["/v1/events"]["get"]["responses"]["200"]["content"]["text/event-stream"]
        missing = {"decision", "task", "progress", "heartbeat"}
        while missing:
            event = await reader.next()
            validate(spec, events["x-events"][event["event"]], event["data"])
            missing.discard(event["event"])


async def test_what_the_document_refuses_the_gateway_refuses(
    api: Any, make_offer: MakeOffer, spec: dict[str, Any]
) -> None:
    """The limits in the schemas are those that are checked."""
    validator = Draft202012Validator({"components": spec["components"], "$ref": "#/components/schemas/Offer"})
    for field, value, _ in BAD_FIELDS:
        if value == value and value not in (float("inf"),):  # JSON has neither
            assert not validator.is_valid(make_offer("x") | {field: value}), field
        async with api.client.post(
            "/v1/offers", data=with_field(make_offer, field, value), headers=JSON
        ) as response:
            assert response.status == 400


class Page(HTMLParser):
    """Fails on what is not closed, and collects what a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        assert tag not in ("script", "img", "link", "iframe")
        assert not any(name.startswith("on") or name == "src" for name in found)
        self.ids += [value for name, value in attributes if name == "id" and value]
        self.links += [value for name, value in attributes if name == "href" and value]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


async def test_the_page_needs_nothing_from_elsewhere(api: Any, spec: dict[str, Any]) -> None:
    async with api.client.get("/v1/docs") as response:
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
        text = await response.text()
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert {link for link in page.links if not link.startswith("#")} == {"openapi.json"}
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    for path in spec["paths"]:
        assert f"<code>{path}</code>" in text
    for name in spec["components"]["schemas"]:
        assert name in page.ids
