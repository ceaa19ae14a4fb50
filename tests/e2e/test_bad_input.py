"""Whatever upstream sends: a clear answer, a slot that is free again, and nothing that crashed."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from podium.client import Refusal
from shared.files import folder_digest
from shared.messages.jobs import ResultStatus
from shared.messages.runs import ErrorCode
from shared.subjects import task_key

ORACLE = Path(__file__).parents[1] / "data" / "oracle"
SERVICES = ("broker", "gateway", "node-a", "node-b")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def machine(machine_with: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One stack for all tests here; at the end every service is still the process that was started."""
    folder = tmp_path_factory.mktemp("bad-input")
    rows = json.loads((ORACLE / "instruct.json").read_text())
    root = folder / "rows"
    (root / "folder").mkdir(parents=True)
    (root / "instruct.json").write_text(json.dumps(rows))
    (root / "page.json").write_text("<html>503</html>\n")
    (root / "not.json").write_text("[instruct, output]\n")
    (root / "cut.json").write_text(json.dumps(rows)[:-100])
    (root / "deep.json").write_text("[" * 100_000)
    (root / "empty.json").write_text("")
    (root / "none.json").write_text("[]")
    (root / "numbers.json").write_text(json.dumps([rows[0], 2, 3, 4]))
    (root / "loop.json").symlink_to("loop.json")
    (root / "out.json").symlink_to(folder / "secret.json")
    (folder / "secret.json").write_text(json.dumps(rows))
    bad = [
        {"instruct": "no output"},
        {"instruct": ["a"], "output": "a list"},
        {"instruct": "x", "output": ""},
    ]
    (root / "some_bad.json").write_text(json.dumps([*rows, *bad, bad[0], 4]))
    # A strong prior: the jobs that fail here would otherwise teach the policy to refuse the others.
    settings = {"PODIUM_DATASET_ROOTS": str(root), "PODIUM_PRIOR_STRENGTH": "1000", "HF_HUB_OFFLINE": "1"}
    machine = machine_with(folder, **settings)
    machine.up()
    before = {service: machine.pid(service) for service in SERVICES}
    yield machine
    assert {service: machine.pid(service) for service in SERVICES} == before


def send(machine: Any, fields: Any) -> Any:
    return machine.client.offer(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hours_to_complete": 0}, "`float` > 0.0 - at `$.hours_to_complete`"),
        ({"hours_to_complete": -1}, "`float` > 0.0 - at `$.hours_to_complete`"),
        ({"hours_to_complete": "soon"}, "got `str` - at `$.hours_to_complete`"),
        ({"hours_to_complete": None}, "got `null` - at `$.hours_to_complete`"),
        ({"hours_to_complete": float("nan")}, "JSON is malformed"),
        ({"hours_to_complete": float("inf")}, "JSON is malformed"),
        ({"task_id": ""}, "length >= 1 - at `$.task_id`"),
        ({"task_id": "x" * 1025}, "length <= 1024 - at `$.task_id`"),
        ({"task_id": 7}, "got `int` - at `$.task_id`"),
        ({"task_id": "\ud800"}, "JSON is malformed"),
        ({"task_type": "Dance"}, "'Dance' - at `$.task_type`"),
        ({"model": ["a"]}, "got `array` - at `$.model`"),
        ({"dataset": None}, "got `null` - at `$.dataset`"),
        ({"dataset": ""}, "length >= 1 - at `$.dataset`"),
        ({"file_format": "xml"}, "'xml' - at `$.file_format`"),
        ({"dataset_type": "instruct"}, "got `str` - at `$.dataset_type`"),
        ({"dataset_type": {"field_output": 3}}, "got `int` - at `$.dataset_type.field_output`"),
        ({"model_params_count": -8}, "`int` >= 1 - at `$.model_params_count`"),
    ],
)
def test_what_is_no_offer_is_told_which_field_and_what_would_be_right(
    machine: Any, change: dict[str, Any], expected: str
) -> None:
    answer = send(machine, machine.fields("no-offer", **change))
    assert isinstance(answer, Refusal)
    assert (answer.status, answer.title) == (400, "Bad Request")
    assert expected in answer.detail
    assert "an offer is a JSON object with task_id" in answer.detail
    assert machine.client.tasks() == []


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'"task_id"'])
def test_a_body_that_is_no_json_object(machine: Any, body: bytes) -> None:
    answer = machine.client.offer(body)
    assert (answer.status, answer.title) == (400, "Bad Request")
    assert "an offer is a JSON object with task_id" in answer.detail


def test_a_body_of_20_mb_is_refused_with_the_setting_that_decides(machine: Any) -> None:
    answer = send(machine, machine.fields("large", dataset="x" * 20_000_000))
    assert answer.status == 413
    assert "PODIUM_MAX_BODY_BYTES" in answer.detail


@pytest.mark.parametrize(
    ("hours", "expected"),
    [
        (1e308, "Job duration too long (>96 hours)"),
        (97, "Job duration too long (>96 hours)"),
        (1e-9, "leave no time"),
    ],
)
def test_hours_that_nobody_could_use_are_rejected(machine: Any, hours: float, expected: str) -> None:
    decision = send(machine, machine.fields("hours", hours_to_complete=hours))
    assert not decision.accepted
    assert expected in decision.reason


# Offered under task ids of every kind: what an id becomes in subjects and folders must not matter.
BAD_JOBS: dict[str, tuple[dict[str, Any], ErrorCode, tuple[str, ...]]] = {
    "a.b": (
        {"model": "org/no-such-0.001B"},
        ErrorCode.MODEL_UNAVAILABLE,
        ("org/no-such-0.001B", "PODIUM_MODELS_DIR"),
    ),
    "*": ({"model": "../../etc-1M"}, ErrorCode.MODEL_UNAVAILABLE, ("'../../etc-1M'", "PODIUM_MODELS")),
    ">": ({"model": "/etc-1M"}, ErrorCode.MODEL_UNAVAILABLE, ("'/etc-1M'", "PODIUM_MODELS")),
    "x" * 300: ({"dataset": "not.json"}, ErrorCode.BAD_DATA, ("not.json", "line 1", "not valid JSON")),
    "page": ({"dataset": "page.json"}, ErrorCode.BAD_DATA, ("page.json", "an HTML page (503)")),
    "\u00e4 \u20ac/#?": ({"dataset": "cut.json"}, ErrorCode.BAD_DATA, ("cut.json", "not valid JSON")),
    "deep": ({"dataset": "deep.json"}, ErrorCode.BAD_DATA, ("deep.json", "nested too deeply")),
    "hub": (
        {"dataset": "org/no-such-set", "file_format": "hf"},
        ErrorCode.DATA_UNAVAILABLE,
        ("org/no-such-set",),
    ),
    "no file": ({"dataset": "absent.json"}, ErrorCode.BAD_DATA, ("no data file at", "absent.json")),
    "folder": ({"dataset": "folder"}, ErrorCode.BAD_DATA, ("no data file at", "folder")),
    "../outside": ({"dataset": "../secret.json"}, ErrorCode.BAD_DATA, ("PODIUM_DATASET_ROOTS",)),
    "link": ({"dataset": "out.json"}, ErrorCode.BAD_DATA, ("PODIUM_DATASET_ROOTS",)),
    "loop": ({"dataset": "loop.json"}, ErrorCode.BAD_DATA, ("loop.json",)),
    "nul\0": ({"dataset": "nul\0.json"}, ErrorCode.BAD_DATA, ("not the name of a file",)),
    "long name": ({"dataset": "n" * 5000}, ErrorCode.BAD_DATA, ("not the name of a file",)),
    "empty": ({"dataset": "empty.json"}, ErrorCode.BAD_DATA, ("empty.json holds no rows",)),
    "none": ({"dataset": "none.json"}, ErrorCode.BAD_DATA, ("none.json holds no rows",)),
    "row": ({"dataset": "numbers.json"}, ErrorCode.BAD_DATA, ("most of its 4 rows", "numbers.json, row 2")),
    "column": (
        {"dataset_type": {"field_instruction": "question", "field_output": "output"}},
        ErrorCode.BAD_DATA,
        ("instruct.json", "no row has the column 'question'", "'instruct', 'output'"),
    ),
    "no columns": ({"dataset_type": {}}, ErrorCode.BAD_DATA, ("field_instruction is missing",)),
    "private": (
        {"dataset": "https://127.0.0.1:1/rows.json?key=secret"},
        ErrorCode.BAD_DATA,
        ("private address 127.0.0.1", "PODIUM_ALLOW_PRIVATE_URLS"),
    ),
    "http": (
        {"dataset": "http://example.org/rows.json?key=secret", "file_format": "s3"},
        ErrorCode.BAD_DATA,
        ("https, not http", "PODIUM_ALLOW_PRIVATE_URLS"),
    ),
    "url": ({"dataset": "https://[bad/rows.json"}, ErrorCode.BAD_DATA, ("not a usable URL",)),
    "ftp": ({"dataset": "ftp://example.org/rows.json"}, ErrorCode.BAD_DATA, ("ftp://",)),
}


@pytest.mark.fault("F14")
def test_every_job_that_cannot_be_run_fails_with_its_reason(machine: Any) -> None:
    for task, (change, _, _) in BAD_JOBS.items():
        accept(machine, machine.fields(task, hours_to_complete=0.1, **change))
    machine.until(lambda: all(slot.state == "free" for slot in machine.client.slots()), "both slots are free")
    views = {view.task_id: view for view in machine.client.tasks()}
    for task, (_, code, words) in BAD_JOBS.items():
        result = views[task].result
        assert (result.status, result.code) == (ResultStatus.FAILED, code), result
        assert [word for word in words if word not in result.reason] == [], result.reason
        assert "secret" not in result.reason or task == "../outside"
        assert views[task].attempts <= 1


def test_jobs_after_all_that_are_submitted_and_bad_rows_are_counted(machine: Any) -> None:
    accept(machine, machine.fields("../../x"))
    accept(machine, machine.fields("rows", dataset="some_bad.json"))
    machine.until(
        lambda: all(slot.state == "free" for slot in machine.client.slots()),
        "both jobs ended",
        limit_s=240.0,  # a search takes the two minutes that it is given
    )
    views = {view.task_id: view for view in machine.client.tasks()}
    good, counted = views["../../x"].result, views["rows"].result
    assert (good.status, counted.status) == (ResultStatus.SUBMITTED, ResultStatus.SUBMITTED)
    submission = machine.data / "artifacts" / task_key("../../x") / "submission"
    assert (Path(good.artifact), folder_digest(submission)) == (submission, good.digest)
    assert Counter(counted.metrics.dropped_rows) - Counter(good.metrics.dropped_rows) == {
        "column 'output' is missing": 2,
        "column 'instruct' is not text": 1,
        "column 'output' is empty": 1,
        "not a JSON object": 1,
    }
    used = [result.metrics.train_examples + result.metrics.dev_examples for result in (good, counted)]
    assert used[0] == used[1] > 0
    by_id = machine.client._get(f"/v1/tasks/{quote('../../x', safe='')}", dict)
    assert by_id["task"] == task_key("../../x")


def accept(machine: Any, fields: dict[str, Any]) -> None:
    """Offer until there is room: both slots may be busy with what was offered before."""
    end = time.monotonic() + 120
    while not (decision := send(machine, fields)).accepted:
        assert "At maximum accuracy capacity" in decision.reason
        assert time.monotonic() < end, "no slot became free"
        time.sleep(0.1)
