"""What people get wrong, and what each command prints: one line that says what to do."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from podium.__main__ import main
from shared.net import free_port

OFFER: dict[str, Any] = {
    "task_id": "t",
    "task_type": "InstructTextTask",
    "model": "org/name",
    "hours_to_complete": 1,
    "dataset": "rows.json",
    "dataset_type": {"field_instruction": "q", "field_output": "a"},
}
TRAIN = ["train", "--model", "org/name", "--data", "rows.json"]
COLUMNS = ["--dataset-type", '{"field_instruction": "q", "field_output": "a"}']


class Gateway(http.server.BaseHTTPRequestHandler):
    """A gateway that answers as a real one does if no token is sent, and one thing that is none."""

    def do_GET(self) -> None:
        body: dict[str, Any] = {"status": 401, "title": "Unauthorized"}
        if self.path.startswith("/v1/tasks/gone"):
            body = {"status": 404, "detail": "unknown task 'gone'; rejected offers are not stored"}
        elif self.path.startswith("/v1/slots"):
            body["detail"] = "a token is required: set PODIUM_API_TOKEN_FILE"
        elif self.path.startswith("/v1/tables"):
            body = {"status": 200, "shop": "open"}
        content = json.dumps(body).encode()
        self.send_response(body["status"])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def gateway() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PODIUM_DATA_DIR", str(tmp_path / "data"))
    (tmp_path / "broken.json").write_text('{"task_id": ')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "typo.json").write_text(json.dumps(OFFER | {"task_idd": "t"}))
    (tmp_path / "late.json").write_text(json.dumps(OFFER | {"hours_to_complete": "soon"}))
    (tmp_path / "image.json").write_text(json.dumps(OFFER | {"task_type": "ImageTask"}))
    (tmp_path / "column.json").write_text(json.dumps(OFFER | {"dataset_type": {"field_outptu": "a"}}))
    (tmp_path / "good.json").write_text(json.dumps(OFFER))
    (tmp_path / "rows.json").write_text(json.dumps([{"question": "1 + 1?", "a": "2"}]))
    (tmp_path / "bad.toml").write_text("slot = ")
    return tmp_path


# (command line, exit code, what is wrong, what to do). GATEWAY, NOBODY: addresses with and without a gateway.
MISTAKES: list[tuple[list[str], int, str, str]] = [
    ([], 2, "required: COMMAND", "see `podium --help`"),
    (["statsu"], 2, "there is no 'statsu'", "is 'status' meant?"),
    (["frobnicate"], 2, "there is no 'frobnicate'", "choose from up, demo, offer"),
    (["jobs"], 2, "required: COMMAND", "see `podium jobs --help`"),
    (["jobs", "inspct", "t"], 2, "there is no 'inspct'", "is 'inspect' meant?"),
    (["status", "--limt", "3"], 2, "unknown option '--limt'", "is '--limit' meant?"),
    (["status", "--limit", "many"], 2, "'many' is not a whole number", "see `podium status --help`"),
    (["status", "now"], 2, "nothing takes the argument 'now'", "see `podium status --help`"),
    (["status", "--url", "NOBODY"], 1, "no gateway at http://127.0.0.1", "is `podium up` running?"),
    (["status", "--url", "localhost:7999"], 1, "must be an http URL", "not 'localhost:7999'"),
    (["status", "--url", "GATEWAY"], 1, "answered 401", "set PODIUM_API_TOKEN_FILE"),
    (["scores", "show", "--url", "GATEWAY"], 1, "is not a gateway", "missing required field"),
    (["jobs", "inspect", "gone", "--url", "GATEWAY"], 1, "unknown task 'gone'", "rejected offers are not"),
    (["cancel", "gone", "--url", "NOBODY"], 1, "no gateway at", "is `podium up` running?"),
    (["drain", "a", "--url", "GATEWAY"], 1, "answered 401", "set PODIUM_API_TOKEN_FILE"),
    (["drain"], 2, "required: SLOT", "see `podium drain --help`"),
    (["logs", "gone", "--url", "GATEWAY"], 1, "unknown task 'gone'", "rejected offers are not"),
    (["track", "--run", "none"], 1, "none is no folder of a `podium train`", "job.json can't be read"),
    (["track", "t", "--run", "none"], 2, "name tasks or --run", "not both"),
    (["track", "--every", "0"], 2, "'0' is not a whole number above 0", "see `podium track --help`"),
    (["watch", "t", "--url", "NOBODY"], 1, "no gateway at", "is `podium up` running?"),
    (["offer", "none.json"], 1, "none.json can't be read", "No such file"),
    (["offer", "broken.json"], 1, "broken.json is not JSON", "line 1 column 13"),
    (["offer", "list.json"], 1, "list.json is not an offer", "Expected `object`"),
    (["offer", "typo.json"], 1, "unknown field 'task_idd'", "is 'task_id' meant?"),
    (["offer", "late.json"], 1, "got `str`", "$.hours_to_complete"),
    (["offer", "column.json"], 2, "unknown 'field_outptu'", "is 'field_output' meant?"),
    (["offer", "good.json", "--check"], 1, "no row has the column 'q'", "'question', 'a'"),
    (["scores", "import", "none.json"], 1, "none.json can't be read", "No such file"),
    (["scores", "import", "list.json"], 1, "list.json, item 0", "a score (task_id and quality_score)"),
    (["plan", "--params", "8B"], 2, "required: --hours", "see `podium plan --help`"),
    (["plan", "--params", "lots", "--hours", "4"], 2, "not a parameter count", "such as 135M or 8B"),
    (["plan", "--params", "8B", "--hours", "later"], 2, "'later' is not a time", "4 (hours), 30m or 90s"),
    (
        ["plan", "--params", "8B", "--hours", "4", "--hardware", "4xH100"],
        1,
        "unknown hardware",
        "4xH100-80GB",
    ),
    ([*TRAIN, "--hours", "5m", "--out", "r"], 2, "dataset_type is missing", "give --dataset-type, or"),
    ([*TRAIN, *COLUMNS, "--out", "r"], 2, "hours_to_complete is missing", "give --hours, or"),
    ([*TRAIN, "--dataset-type", "{"], 2, "--dataset-type is invalid", "line 1 column 2"),
    ([*TRAIN, "--task-type", "ImageTask"], 2, "no 'ImageTask'", "InstructTextTask, ChatTask, DpoTask"),
    ([*TRAIN, "--profile", "maximum_acuracy"], 2, "no 'maximum_acuracy'", "is 'maximum_accuracy' meant?"),
    (["train", "none.json", "--out", "r"], 2, "none.json can't be read", "No such file"),
    (["train", "typo.json", "--out", "r"], 2, "unknown field 'task_idd'", "is 'task_id' meant?"),
    (["train", "image.json", "--out", "r"], 2, "a ImageTask can't be trained", "only InstructTextTask"),
    (["train", "good.json"], 2, "out is missing", "give --out, or 'out' in a CONFIG file"),
    (["policy", "replay", "none.jsonl"], 1, "none.jsonl can't be read", "No such file"),
    (["policy", "replay", "list.json", "--policy", "best"], 2, "'best'", "maximum_accuracy"),
    (["completion", "powershell"], 2, "there is no 'powershell'", "choose from bash, zsh, fish"),
    (["restore", "none.jsonl"], 1, "none.jsonl can't be read", "No such file"),
]


@pytest.mark.parametrize(("line", "code", "what", "advice"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_a_mistake_gets_one_line_that_says_what_to_do(
    line: list[str], code: int, what: str, advice: str, gateway: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"GATEWAY": gateway, "NOBODY": f"http://127.0.0.1:{free_port()}"}
    try:
        ended = main([places.get(word, word) for word in line])
    except SystemExit as error:
        ended = int(error.code or 0)
    said = capsys.readouterr().err.strip()
    assert (ended, len(said.splitlines())) == (code, 1), said
    assert said.startswith("podium"), said
    assert what in said
    assert advice in said


@pytest.mark.parametrize(
    ("variable", "value", "what"),
    [
        ("PODIUM_SLOTT", "a", "unknown setting PODIUM_SLOTT; `podium settings` lists"),
        ("PODIUM_MAX_HOURS", "many", "$.max_hours"),
        ("PODIUM_CONFIG", "bad.toml", "settings file bad.toml is not TOML"),
        ("PODIUM_CONFIG", "none.toml", "settings file none.toml can't be read"),
        ("PODIUM_API_TOKEN_FILE", "none.token", "none.token"),
    ],
)
def test_a_wrong_setting_is_named(
    variable: str,
    value: str,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    assert main(["status", "--url", f"http://127.0.0.1:{free_port()}"]) == 2
    assert what in capsys.readouterr().err
