"""Data sets of the hub by id, from a local server that speaks the hub's HTTP API."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from shared.errors import DataError, DataUnavailableError, EngineError
from shared.messages.offers import FileFormat
from shared.messages.runs import ErrorCode
from trainer_node.engine.data import hf_datasets
from trainer_node.engine.data.sources import read_rows
from trainer_node.engine.model.loading import load_config

REVISION = "5f2c" * 10
ROWS = [{"text": "one"}, {"text": "two"}, {"text": "three"}]


class Hub(BaseHTTPRequestHandler):
    """Repositories by id: files, and the card's configurations. `closed` ones want the token."""

    repos: dict[str, dict[str, bytes]] = {}
    configs: dict[str, list[dict[str, Any]]] = {}
    closed: set[str] = set()
    failures = 0
    seen: list[tuple[str, str]] = []

    def do_GET(self) -> None:
        path, allowed = self.path.partition("?")[0], self.headers.get("Authorization") == "Bearer secret"
        Hub.seen.append((path, self.headers.get("Authorization", "")))
        if Hub.failures:
            Hub.failures -= 1
            return self.answer(503)
        if path.startswith("/elsewhere/"):
            return self.answer(200, bytes.fromhex(path.rpartition("/")[2]))
        repo = "/".join(path.removeprefix("/api").removeprefix("/datasets").split("/")[1:3])
        if repo not in Hub.repos:
            return self.answer(401, error="RepoNotFound")
        if repo in Hub.closed and not allowed:
            return self.answer(401, error="GatedRepo")
        if path.startswith("/api/"):
            siblings = [{"rfilename": name, "size": len(body)} for name, body in Hub.repos[repo].items()]
            card = {"configs": Hub.configs.get(repo)}
            about = {"id": repo, "sha": REVISION, "siblings": siblings, "cardData": card}
            return self.answer(200, json.dumps(about).encode())
        body = Hub.repos[repo].get(path.partition(f"/resolve/{REVISION}/")[2])
        if body is None:
            return self.answer(404, error="EntryNotFound")
        # As large files are: to another host, which is not to see the token.
        assert isinstance(self.server, HTTPServer)
        port = self.server.server_port
        return self.answer(302, location=f"http://localhost:{port}/elsewhere/{body.hex()}")

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"", error: str = "", location: str = "") -> None:
        self.send_response(status)
        for name, value in (("X-Error-Code", error), ("Location", location)):
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(hf_datasets, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    Hub.repos, Hub.configs, Hub.closed, Hub.failures, Hub.seen = {}, {}, set(), 0, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        _use(monkeypatch, url)
        yield url
        server.shutdown()
        thread.join()


def _use(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def _parquet(rows: list[dict[str, str]], path: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


def _read(repo: str, keep: Path | None = None) -> list[dict[str, Any]]:
    return read_rows(repo, FileFormat.HF, allow_private_urls=False, keep=keep).rows


def test_the_rows_of_all_training_files_in_order(tmp_path: Path) -> None:
    Hub.repos["org/set"] = {
        "README.md": b"# a set",
        "data/train-00001-of-00002.parquet": _parquet(ROWS[2:], tmp_path / "b"),
        "data/train-00000-of-00002.parquet": _parquet(ROWS[:2], tmp_path / "a"),
        "data/test-00000-of-00001.parquet": _parquet([{"text": "held out"}], tmp_path / "c"),
    }
    Hub.closed = {"org/set"}
    Hub.failures = 2
    assert _read("org/set") == ROWS
    assert {token for path, token in Hub.seen if path.startswith("/elsewhere/")} == {""}
    own = {token for path, token in Hub.seen if "org/set" in path}
    assert own == {"Bearer secret"}, Hub.seen


def test_the_card_says_which_files(tmp_path: Path) -> None:
    Hub.repos["org/set"] = {"x.jsonl": b'{"text": "one"}\n', "y.jsonl": b'{"text": "no"}\n'}
    Hub.configs["org/set"] = [
        {"config_name": "default", "data_files": [{"split": "train", "path": "x.jsonl"}]}
    ]
    assert _read("org/set") == ROWS[:1]


def test_a_resumed_run_needs_the_hub_no_more(tmp_path: Path) -> None:
    Hub.repos["org/set"] = {"rows.csv": b"text\none\ntwo\n", "dataset_infos.json": b"{}"}
    assert _read("org/set", tmp_path / "data") == ROWS[:2]
    kept = dict(Hub.repos)
    Hub.repos.clear()
    assert _read("org/set", tmp_path / "data") == ROWS[:2]
    next(tmp_path.rglob("files.json")).write_bytes(b'{"repo": "\xff"}')
    Hub.repos.update(kept)
    assert _read("org/set", tmp_path / "data") == ROWS[:2]


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("org/none", r"org/none, or it is private: set HF_TOKEN .*PODIUM_WORKER_ENVIRONMENT=HF_TOKEN"),
        ("org/empty", r"data set org/empty can't be used: it has no data file that could be read"),
        ("org/large", r"org/large has 1 training files of 0.0 GB together: 0.0 GB is the most"),
        ("org/broken", r"org/broken/00000.json is not valid JSON"),
    ],
)
def test_what_is_wrong_is_said(repo: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_datasets, "MAX_BYTES", 30)
    Hub.repos |= {
        "org/empty": {"README.md": b""},
        "org/large": {"rows.json": b"[" + b" " * 30 + b"]"},
        "org/broken": {"rows.json": b'[{"text": '},
    }
    with pytest.raises(DataError, match=message):
        _read(repo)


@pytest.mark.parametrize(
    ("repo", "why"),
    [("org/gated", "gated: set HF_TOKEN"), ("org/none", "or it is private: set HF_TOKEN")],
)
def test_how_a_worker_gets_a_token_is_said(repo: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")  # as a worker's environment lacks it
    Hub.repos["org/gated"], Hub.closed = {"rows.json": b"[]", "config.json": b"{}"}, {"org/gated"}
    hf_datasets.is_reachable.cache_clear()
    advice = f"{repo}.*{why} .*PODIUM_WORKER_ENVIRONMENT=HF_TOKEN"
    with pytest.raises(DataUnavailableError, match=advice):
        _read(repo)
    with pytest.raises(EngineError, match=advice) as caught:
        load_config(repo)
    assert caught.value.code is ErrorCode.MODEL_UNAVAILABLE
    hf_datasets.is_reachable.cache_clear()


def test_the_largest_size_holds_for_what_comes_not_for_what_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hf_datasets, "MAX_BYTES", 40)
    Hub.repos["org/set"] = {"a.json": b'[{"text": "one"}]', "b.json": b'[{"text": "two"}]'}
    assert len(_read("org/set")) == 2
    monkeypatch.setattr(hf_datasets, "MAX_BYTES", 34)
    assert len(_read("org/set")) == 2
    monkeypatch.setattr(hf_datasets, "MAX_BYTES", 33)
    with pytest.raises(DataError, match="is the most"):
        _read("org/set")


def test_a_private_hub_needs_the_operators_word(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    Hub.repos["org/set"] = {"a.json": b'[{"text": "one"}]'}
    monkeypatch.setattr(hf_datasets, "PUBLIC", endpoint)  # as if the world's own hub had a private address
    with pytest.raises(DataError, match="must come over https"):
        _read("org/set")


def test_without_a_hub_an_unknown_model_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_datasets.is_reachable.cache_clear()
    assert hf_datasets.is_reachable()
    hf_datasets.is_reachable.cache_clear()
    _use(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(DataUnavailableError, match=r"data set org/set can't be read: http://127\.0\.0\.1:9"):
        _read("org/set")
    with pytest.raises(EngineError, match=r"org/model is not on this machine, and the hub .* answer"):
        load_config("org/model")
    hf_datasets.is_reachable.cache_clear()
