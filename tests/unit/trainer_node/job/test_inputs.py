"""Where model and data are: names resolve, paths don't get out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from shared.errors import DataError, EngineError
from shared.messages.jobs import Job
from shared.messages.offers import DatasetType, Decision, FileFormat, Offer, TaskType
from shared.planning.hardware import parse_hardware
from shared.settings import Settings
from trainer_node import transfer_rates
from trainer_node.job.inputs import dataset_path, model_path, upload_s, worker_job

JSON = FileFormat.JSON
H100 = parse_hardware("4xH100-80GB")
SMALL = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "intermediate_size": 1536,
    "vocab_size": 49152,
}


def test_a_model_set_by_name_wins(tmp_path: Path) -> None:
    (tmp_path / "org--name").mkdir()
    settings = Settings(models={"org/name": str(tmp_path / "mine")}, models_dir=str(tmp_path))
    assert model_path(settings, "org/name") == str(tmp_path / "mine")


@pytest.mark.parametrize("folder", ["Org--Name", "Name", "org--name", "name"])
def test_a_model_folder_is_found(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    assert model_path(Settings(models_dir=str(tmp_path)), "Org/Name") == str(tmp_path / folder)


def test_an_unknown_model_is_left_to_the_hub(tmp_path: Path) -> None:
    assert model_path(Settings(models_dir=str(tmp_path)), "org/name") == "org/name"


@pytest.mark.parametrize("model", ["/etc", "../../x", "a/../b", "a/b/c", ".hidden", "~/x", "", "a b"])
def test_a_path_is_no_model(model: str) -> None:
    with pytest.raises(EngineError, match="PODIUM_MODELS"):
        model_path(Settings(), model)


@pytest.mark.parametrize("url", ["https://host/x.json?sig=1", "http://10.0.0.1/x", "HTTPS://host/x"])
def test_urls_pass(url: str) -> None:
    assert dataset_path(Settings(), url, FileFormat.S3) == url


def test_other_schemes_do_not() -> None:
    with pytest.raises(DataError, match="file://"):
        dataset_path(Settings(dataset_roots=("/",)), "file:///etc/passwd", JSON)


def test_data_set_ids_pass_and_paths_do_not() -> None:
    assert dataset_path(Settings(), "org/data", FileFormat.HF) == "org/data"
    with pytest.raises(DataError, match="not the id"):
        dataset_path(Settings(), "/etc", FileFormat.HF)


def test_files_in_a_root_are_found_by_path_and_by_name(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    first.mkdir()
    second.mkdir()
    file = second / "rows.json"
    file.write_text("[]")
    settings = Settings(dataset_roots=(str(first), str(second)))
    assert dataset_path(settings, str(file), JSON) == str(file)
    assert dataset_path(settings, "rows.json", JSON) == str(file)
    with pytest.raises(DataError, match="no data file"):
        dataset_path(settings, "other.json", JSON)


def test_nothing_outside_is_reached(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret"
    root.mkdir()
    outside.write_text("secret")
    (root / "link").symlink_to(outside)
    settings = Settings(dataset_roots=(str(root),))
    for path in (str(outside), "../secret", str(root / ".." / "secret"), "link", str(root / "link")):
        with pytest.raises(DataError, match="PODIUM_DATASET_ROOTS"):
            dataset_path(settings, path, JSON)


def test_without_roots_no_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[]")
    with pytest.raises(DataError, match="now: none"):
        dataset_path(Settings(), str(file), JSON)


@pytest.mark.parametrize("name", ["nul\0.json", "n" * 5000, "loop"])
def test_what_names_no_file_is_an_error_of_the_data(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match="not the name of a file"):
        dataset_path(Settings(dataset_roots=(str(tmp_path),)), name, JSON)


def job_of_8b(hours: float) -> Job:
    offer = Offer(
        task_id="t1",
        task_type=TaskType.INSTRUCT,
        model="org/llama-8b",
        model_params_count=8_000_000_000,
        hours_to_complete=hours,
        dataset="https://host/x.json",
        dataset_type=DatasetType(field_instruction="q", field_output="a"),
    )
    decision = Decision(task_id="t1", task="t1", accepted=True, reason="", decided_at=0.0, gateway="g")
    return Job(
        record_id="r",
        task_id="t1",
        task="t1",
        slot="a",
        gateway="g",
        offer=offer,
        decision=decision,
        received_at=0.0,
        deadline_at=hours * 3600.0,
    )


def reserve_s(settings: Settings, hours: float) -> float:
    job = job_of_8b(hours)
    return job.deadline_at - worker_job(settings, job, H100, 1).ready_by


def test_an_offer_that_the_planner_refuses_keeps_no_time_for_an_upload(tmp_path: Path) -> None:
    """Somebody accepted it nonetheless, and nothing is known of what it will submit."""
    settings = Settings(node_dir=str(tmp_path), submit_reserve_s=30.0, artifacts_kind="hub")
    job = job_of_8b(4.0)
    large = replace(job, offer=replace(job.offer, model_params_count=10**12))
    assert upload_s(settings, large, parse_hardware("1xH100-80GB")) == 0.0


@pytest.mark.parametrize("model", ["me/llama-8b-ocr", "me/llama-8b-gptq"])
def test_a_name_that_would_be_refused_keeps_time_for_its_upload(tmp_path: Path, model: str) -> None:
    """The gateway accepted it by its config: 16 GB over 50 MB/s are 320 s."""
    settings = Settings(node_dir=str(tmp_path), artifacts_kind="hub")
    job = job_of_8b(4.0)
    named = replace(job, offer=replace(job.offer, model=model))
    assert upload_s(settings, named, H100) == upload_s(settings, job, H100) > 300.0


@pytest.mark.parametrize("content", ["config", "", "[]", "[" * 100_000])
def test_the_config_of_a_copy_states_the_size_that_its_name_does_not(tmp_path: Path, content: str) -> None:
    """A name without a size is taken for 7 billion parameters; a folder without a good config as well."""
    (tmp_path / "mystery").mkdir()
    (tmp_path / "mystery" / "config.json").write_text(json.dumps(SMALL) if content == "config" else content)
    settings = Settings(node_dir=str(tmp_path), models_dir=str(tmp_path), artifacts_kind="hub")
    job = job_of_8b(4.0)
    mystery = replace(job, offer=replace(job.offer, model="me/mystery", model_params_count=None))
    took_s = upload_s(settings, mystery, H100)
    if content == "config":
        assert 0 < took_s < 10
    else:
        assert took_s > 200


def test_a_mixtures_upload_is_that_of_its_attention(tmp_path: Path) -> None:
    """Cut over the GPUs 30B would be trained whole, and 60 GB stored; each holds all of a mixture."""
    settings = Settings(node_dir=str(tmp_path), models_dir=str(tmp_path), artifacts_kind="hub")
    job = job_of_8b(24.0)
    offer = replace(job.offer, model="me/mine", model_params_count=30 * 10**9)
    hardware = parse_hardware("8xH100-80GB")
    assert upload_s(settings, replace(job, offer=offer), hardware) > 1000.0
    named = replace(offer, model="Qwen/Qwen3-30B-A3B")
    assert 0 < upload_s(settings, replace(job, offer=named), hardware) < 300.0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps({**SMALL, "num_experts": 128}))
    assert 0 < upload_s(settings, replace(job, offer=offer), hardware) < 300.0


def test_a_run_ends_early_enough_for_its_upload(tmp_path: Path) -> None:
    """16 GB over 50 MB/s: 320 s, where 30 s were kept."""
    disk = Settings(node_dir=str(tmp_path), submit_reserve_s=30.0)
    hub = Settings(node_dir=str(tmp_path), submit_reserve_s=30.0, artifacts_kind="hub")
    assert reserve_s(disk, 4.0) == 30.0
    assumed = reserve_s(hub, 4.0)
    assert assumed == pytest.approx(30.0 + 320.0, rel=0.05)
    transfer_rates.note(
        tmp_path, transfer_rates.Direction.UPLOAD, 10**9, 10**9 / (2 * hub.hub_upload_bytes_per_s)
    )
    assert reserve_s(hub, 4.0) - 30.0 == pytest.approx((assumed - 30.0) / 2)
    transfer_rates.note(tmp_path, transfer_rates.Direction.UPLOAD, 10**9, 10**9)
    assert reserve_s(hub, 4.0) <= 30.0 + 4 * 3600 / 4  # a quarter of the time at most
