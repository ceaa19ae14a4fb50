"""What of a worker's progress a node publishes, and what it learns on the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.messages.encoding import encode
from shared.messages.runs import ModelDownload, Phase, Progress
from shared.settings_sources import load_settings
from trainer_node.job.monitor import WorkerMonitor, worth_publishing
from trainer_node.transfer_rates import Direction, measured
from trainer_node.worker.run_folder import RunFolder


class SilentBus:
    """Publishes to nobody."""

    async def publish(self, subject: str, data: bytes) -> None:
        """Do nothing."""


def test_a_message_is_always_published() -> None:
    lines = [
        Progress(
            task="t", slot="a", phase=Phase.INGEST, step=step, message="3 rows dropped" if step == 1 else None
        )
        for step in range(5)
    ]
    assert [reported.step for reported in worth_publishing(lines)] == [1, 4]
    assert worth_publishing([]) == []


@pytest.mark.parametrize(
    ("content", "rate"),
    [
        (encode(ModelDownload(size=16_000_000_000, seconds=160.0)), 100e6),
        (encode(ModelDownload(size=1000, seconds=1.0)), None),
        (b"{", None),
        (None, None),
    ],
)
async def test_a_models_download_is_counted_once(
    tmp_path: Path, content: bytes | None, rate: float | None
) -> None:
    settings = load_settings({}, node_dir=str(tmp_path))
    run = RunFolder(settings.node, "t")
    run.path.mkdir(parents=True)
    context: Any = SimpleNamespace(settings=settings, bus=SilentBus())
    job: Any = SimpleNamespace(task="t", slot="a", deadline_at=0.0)
    monitor = WorkerMonitor(context, job, run, 0.0)
    line = encode(Progress(task="t", slot="a", phase=Phase.BASELINE)) + b"\n"
    run.progress_file.write_bytes(line)
    if content is not None:
        run.download_file.write_bytes(content)
    assert await monitor.publish()
    assert measured(settings.node, Direction.DOWNLOAD) == rate
    assert not run.download_file.exists()
    with run.progress_file.open("ab") as file:
        file.write(line)
    assert await monitor.publish()
    assert measured(settings.node, Direction.DOWNLOAD) == rate


async def test_progress_that_can_not_be_read_shows_no_silence_and_stops_nothing(tmp_path: Path) -> None:
    settings = load_settings({}, node_dir=str(tmp_path))
    run = RunFolder(settings.node, "t")
    run.progress_file.mkdir(parents=True)
    context: Any = SimpleNamespace(settings=settings, bus=SilentBus())
    job: Any = SimpleNamespace(task="t", slot="a", deadline_at=0.0)
    assert await WorkerMonitor(context, job, run, 0.0).publish()
