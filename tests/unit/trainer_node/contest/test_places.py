"""Where things are mounted, when the container began, what it was given: all without I/O."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from shared.errors import SettingsError
from shared.messages.hardware import Hardware
from shared.messages.offers import DatasetType, FileFormat, TaskType
from trainer_node.contest.arguments import ContestTask
from trainer_node.contest.baseline_stats import MOST_BYTES, BaselineStats, read_stats
from trainer_node.contest.container_clock import MOST_AGE_S, age_from
from trainer_node.contest.mounts import mounts_of
from trainer_node.contest.runner import settings_of
from trainer_node.contest.worker_jobs import times_of, worker_job
from trainer_node.worker.environment import worker_environment

TASK = ContestTask(
    task_id="t1",
    model="org/model",
    task_type="ChatTask",
    dataset_type=DatasetType(chat_column="conversations"),
    expected_repo_name="tournament-x-t1-5F",
    hours=0.75,
)
STARTED_AT_1 = f"1 (x) S {' '.join(['0'] * 18)} 100 0"
GPU = Hardware(device="H100", count=2, memory_bytes=80 * 2**30)


def test_mounts_are_where_upstream_puts_them() -> None:
    mounts = mounts_of(TASK)
    assert mounts.model == Path("/cache/models/org--model")
    assert mounts.data == Path("/cache/datasets/t1_train_data.json")
    assert mounts.submission == Path("/app/checkpoints/t1/tournament-x-t1-5F")


def test_the_work_lies_next_to_the_submission_and_never_in_it() -> None:
    mounts = mounts_of(TASK)
    assert mounts.work.parent == mounts.submission.parent  # one file system: a rename is atomic
    assert mounts.work != mounts.submission


def test_nothing_is_written_to_a_read_only_mount() -> None:
    places = [Path(value) for name, value in mounts_of(TASK).environment.items() if value != "1"]
    assert places
    assert not [place for place in places if place.is_relative_to("/cache")]


def test_the_worker_gets_the_variables_that_keep_it_offline() -> None:
    environment = mounts_of(TASK).environment
    assert worker_environment(environment, 1, None).items() >= environment.items()
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_the_time_counts_from_the_container_start() -> None:
    times = times_of(TASK, 1000.0)
    assert times.killed_at == 1000.0 + 2700.0
    assert times.ready_by == times.killed_at - 10.0


def test_a_short_task_keeps_a_short_margin() -> None:
    times = times_of(replace(TASK, hours=0.01), 0.0)
    assert times.killed_at - times.ready_by == pytest.approx(0.02 * 36.0)


def test_the_job_of_a_task() -> None:
    job = worker_job(TASK, TaskType.CHAT, mounts_of(TASK), times_of(TASK, 1000.0), GPU, 8, "auto")
    assert (job.model, job.model_path) == ("org/model", "/cache/models/org--model")
    assert (job.dataset, job.file_format) == ("/cache/datasets/t1_train_data.json", FileFormat.JSON)
    assert (job.start_at, job.ready_by, job.profile) == (1000.0, 3690.0, "auto")
    assert job.checkpoint_interval_s == pytest.approx(0.02 * 2700.0)  # within a tenth of the time
    assert job.hardware == GPU


def test_age_of_a_process() -> None:
    stat = f"1 (python (x)) S {' '.join(['0'] * 18)} 12345 0 0"
    assert age_from(stat, 100, 124.0) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("stat", "boot_s"),
    [("", 10.0), ("1 (x) S 0", 10.0), (STARTED_AT_1, 0.5), (STARTED_AT_1, 2.0 + MOST_AGE_S)],
)
def test_an_age_that_can_not_be_is_none(stat: str, boot_s: float) -> None:
    assert age_from(stat, 100, boot_s) is None


def test_statistics_are_hints(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    path.write_text(
        json.dumps(
            {
                "task_type": "instruct",
                "dataset": {"total_tokens": 5e6, "num_records": 0, "near_duplicate_rate": 0.1},
                "weights": {"by_group": {}},
                "training": {"init_loss": 2.5, "masked_completion_loss": None},
                "throughput": None,
            }
        )
    )
    stats = read_stats(path)
    assert isinstance(stats, BaselineStats)
    assert stats.summary() == {"tokens": 5e6, "base_loss": 2.5}


@pytest.mark.parametrize(
    "content", ["", "[]", '{"dataset": 3}', "[" * 100_000, '{"training": {"init_loss": "x"}}']
)
def test_statistics_that_can_not_be_used_say_why(content: str, tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    path.write_text(content)
    assert isinstance(read_stats(path), str)
    assert isinstance(read_stats(tmp_path / "none.json"), str)


def test_huge_statistics_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    path.write_bytes(b" " * (MOST_BYTES + 1))
    assert "more than" in str(read_stats(path))


def test_settings_are_the_containers_alone() -> None:
    given = {"PODIUM_THREADS": "3", "PODIUM_SLOT": "b", "PODIUM_CONTEST_PROFILES": "auto"}
    settings = settings_of(mounts_of(TASK), given)
    assert (settings.threads, settings.slot, settings.hardware) == (3, "contest", "auto")
    with pytest.raises(SettingsError, match="threads"):
        settings_of(mounts_of(TASK), {"PODIUM_THREADS": "many"})


def test_the_job_knows_what_the_divergence_counts_for() -> None:
    def coefficient(task: ContestTask) -> float:
        times = times_of(task, 0.0)
        return worker_job(task, TaskType.INSTRUCT, mounts_of(task), times, GPU, 8, "auto").kl_coefficient

    assert coefficient(TASK) == 0.0
    assert coefficient(replace(TASK, kl_coefficient=0.25)) == 0.25
