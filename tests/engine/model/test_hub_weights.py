"""Weights that come from a hub: what is fetched ahead, and that its time is measured only where it tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from bench.harness.fake_hub import TOKEN, FakeHub
from shared.clock import WallClock
from shared.json_files import load_json
from shared.messages.runs import ModelDownload, OutcomeStatus
from shared.planning.plan import Plan
from tests.engine import worker_run
from trainer_node.engine.assemble import load_base
from trainer_node.engine.context import RunContext
from trainer_node.engine.data import hf_datasets
from trainer_node.engine.model.hub_weights import fetch_weights, weight_files
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.signals import Stop

MODEL = "org/tiny"
WEIGHTS = b"w" * 5000
SHARDED = {
    "model.safetensors.index.json": b"{}",
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS + b"x",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub that the library asks, and an empty cache."""
    hub = FakeHub()
    hub.repos[MODEL] = []
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    remembered = hf_datasets.is_reachable
    remembered.cache_clear()
    yield hub
    hub.close()
    remembered.cache_clear()


@pytest.mark.parametrize(
    ("others", "size"),
    [
        ({"model.safetensors": WEIGHTS}, 5000),
        ({"model.safetensors": WEIGHTS, "pytorch_model.bin": WEIGHTS * 9, **SHARDED}, 5000),
        (SHARDED, 10003),
        ({"pytorch_model.bin": WEIGHTS, "original/model.safetensors": WEIGHTS}, 5000),
    ],
)
def test_what_came_is_counted_once(hub: FakeHub, others: dict[str, bytes], size: int) -> None:
    hub.commit(MODEL, "weights", {"config.json": b"{}", "README.md": b"#" * 700, **others})
    found = fetch_weights(MODEL)
    assert found is not None
    assert found.size == size
    assert 0 < found.seconds < 60
    assert fetch_weights(MODEL) is None  # it is here


def test_only_what_was_missing_is_counted(hub: FakeHub) -> None:
    hub.commit(MODEL, "weights", {"model.safetensors": WEIGHTS})
    assert fetch_weights(MODEL) is not None
    hub.commit(MODEL, "in parts", SHARDED | {"model-00001-of-00002.safetensors": WEIGHTS})
    found = fetch_weights(MODEL)
    assert found is not None
    assert found.size == 5003  # the second part and the index; the first one's bytes are here


def test_a_download_that_was_begun_before_tells_nothing(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit(MODEL, "weights", {"model.safetensors": WEIGHTS})
    blobs = tmp_path / "cache" / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(WEIGHTS[:100])
    assert fetch_weights(MODEL) is None
    assert "resolve" in hub.seen  # it was fetched all the same


@pytest.mark.parametrize("kind", ["info", "tree", "resolve"])
def test_what_goes_wrong_is_left_to_the_loading(hub: FakeHub, kind: str) -> None:
    hub.commit(MODEL, "weights", {"model.safetensors": WEIGHTS})
    hub.fault(kind, *[404] * 9)
    assert fetch_weights(MODEL) is None


def test_nothing_is_asked_about_a_folder_or_by_a_machine_without_a_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch_weights(str(tmp_path)) is None
    monkeypatch.setattr(hf_datasets, "is_reachable", lambda: False)
    assert fetch_weights(MODEL) is None
    assert hub.seen == []


def test_without_weights_there_is_nothing_to_fetch(hub: FakeHub) -> None:
    hub.commit(MODEL, "words", {"config.json": b"{}", "model.gguf": WEIGHTS})
    assert weight_files(["config.json", "model.gguf"]) == []
    assert fetch_weights(MODEL) is None


def test_a_run_says_how_its_model_came(
    hub: FakeHub, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    hub.commit(MODEL, "weights", files)
    asks = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    monkeypatch.setattr(worker_run, "ENVIRONMENT", {**worker_run.ENVIRONMENT, **asks, "HF_TOKEN": TOKEN})
    data = worker_run.write_rows(tmp_path)
    job = worker_run.write_job(tmp_path / "run", tiny_model, data, model_path=MODEL)
    assert worker_run.start_worker(job).wait(worker_run.WAIT_S) == 0
    assert worker_run.outcome_of(job).status is OutcomeStatus.READY
    found = load_json(job.parent / "download.json", ModelDownload)
    assert found.size == len(files["model.safetensors"])


def test_a_run_goes_on_where_it_can_not_note_how_its_model_came(
    hub: FakeHub, tiny_model: Path, tmp_path: Path, make_plan: Callable[..., Plan]
) -> None:
    hub.commit(MODEL, "weights", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
    job = worker_run.write_job(tmp_path / "run", Path(MODEL), tmp_path / "rows.json")
    (job.parent / "download.json").mkdir()
    reporter = Reporter(job.parent / "progress.jsonl", "t", "a")
    run = RunContext(worker_run.bare_job(model_path=MODEL), job.parent, WallClock(), reporter, Stop())
    model = load_base(run, make_plan("dense", dtype="float32"))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}  # loaded
    (said,) = [line.message for line in worker_run.progress_of(job) if line.message]
    assert said.startswith(f"{job.parent / 'download.json'} can't be written (Is a directory): ")
    assert said.endswith("free or repair that disk, which checkpoints need, too")
