"""What a checkpoint holds on the disk that there is, and runs whose disk fills up."""

from __future__ import annotations

import errno
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from shared.messages.runs import OutcomeStatus
from shared.planning.plan import Repair
from tests.engine.positions import save_step
from tests.engine.train.conftest import Build, StopAfter
from tests.engine.worker_run import finish, progress_of
from trainer_node.engine.export import writer
from trainer_node.engine.train import async_saver, checkpoint, loop, saved_state
from trainer_node.engine.train.disk_plan import (
    SPARE_BYTES,
    CheckpointContent,
    DiskChoice,
    Sizes,
    after_failure,
    choose,
    share_of,
)

GB = 10**9
DENSE_8B = Sizes(weights=28 * GB, moments=56 * GB, extras=0)
EXPORT = 16 * GB


@pytest.mark.parametrize(
    ("free", "older", "wanted"),
    [
        (200, (), DiskChoice(CheckpointContent.WHOLE)),
        (100, (), DiskChoice(CheckpointContent.WHOLE)),  # 84 + 16
        (99, (), DiskChoice(CheckpointContent.NARROW_MOMENTS)),
        (99, (84, 84), DiskChoice(CheckpointContent.WHOLE, 1)),  # fewer checkpoints rather than smaller ones
        (10, (84, 84), DiskChoice(CheckpointContent.WHOLE, 2)),
        (72, (), DiskChoice(CheckpointContent.NARROW_MOMENTS)),  # 56 + 16
        (71, (), DiskChoice(CheckpointContent.WEIGHTS)),
        (44, (), DiskChoice(CheckpointContent.WEIGHTS)),  # 28 + 16
        (43, (), DiskChoice(CheckpointContent.NOTHING)),
        (0, (43,), DiskChoice(CheckpointContent.NOTHING)),  # deleting would help nobody
        (0, (), DiskChoice(CheckpointContent.NOTHING)),
    ],
)
def test_the_fullest_content_that_fits(free: int, older: tuple[int, ...], wanted: DiskChoice) -> None:
    sizes = tuple(size * GB for size in older)
    assert choose(DENSE_8B, free * GB, EXPORT, sizes, CheckpointContent.WHOLE) == wanted


def test_several_writers_share_what_is_free_and_the_reserve_is_there_once() -> None:
    assert share_of(1000, 200, 1) == 1000
    assert share_of(1000, 200, 4) == 400
    assert share_of(100, 200, 4) < 200  # nothing fits


def test_after_a_failure_less_is_tried_but_always_the_weights() -> None:
    tried = [CheckpointContent.WHOLE]
    for _ in range(3):
        tried.append(after_failure(tried[-1]))
    assert tried == [
        CheckpointContent.WHOLE,
        CheckpointContent.NARROW_MOMENTS,
        CheckpointContent.WEIGHTS,
        CheckpointContent.WEIGHTS,
    ]
    assert (
        choose(DENSE_8B, 10**15, EXPORT, (), CheckpointContent.WEIGHTS).content is CheckpointContent.WEIGHTS
    )


def test_extras_are_left_out_with_the_moments() -> None:
    sizes = Sizes(weights=4, moments=8, extras=3)
    assert [sizes.of(content) for content in CheckpointContent] == [15, 11, 4, 0]


def _with_free(monkeypatch: pytest.MonkeyPatch, free: Callable[[], float]) -> None:
    monkeypatch.setattr(async_saver, "free_bytes", lambda folder: int(free()))


def _room(state: Any, content: CheckpointContent) -> int:
    return saved_state.sizes_of(state, over=False).of(content) + saved_state.export_bytes(state) + SPARE_BYTES


def _deletable(state: Any) -> int:
    return sum(map(checkpoint.freed_by, checkpoint.by_value(state.saver.folder)[:-1]))


def test_a_whole_model_is_kept_room_for_if_frozen_weights_were_restored(build: Build) -> None:
    state, _, _ = build("run", "lora")
    parameters = sum(value.numel() for value in state.deltas.model.parameters())
    assert saved_state.export_bytes(state) < parameters
    state.plan = replace(state.plan, repair=Repair(1.2, ["lm_head.weight"]))
    assert saved_state.export_bytes(state) == 2 * parameters


@pytest.mark.parametrize("content", list(CheckpointContent))
@pytest.mark.parametrize("method", ["lora", "dense"])
def test_a_run_goes_on_with_what_fits(
    method: str,
    content: CheckpointContent,
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    calm, reporter, stop = build("calm", method)
    loop.train(calm, reporter, stop)
    short, reporter, stop = build("short", method, stop=StopAfter(31))
    _with_free(monkeypatch, lambda: _room(short, content) - _deletable(short))
    loop.train(short, reporter, stop)
    assert short.step > 5
    said = (tmp_path / "short" / "progress.jsonl").read_text()
    assert ("of the disk are free" in said) == (content is not CheckpointContent.WHOLE)
    found = checkpoint.newest(short.saver.folder, pytest.fail)
    if content is CheckpointContent.NOTHING:
        assert found is None
        return
    assert found is not None
    assert found.has_moments == (content is not CheckpointContent.WEIGHTS)
    kept = {name: value.dtype for name, value in found.tensors("optimizer").items()}
    if content is CheckpointContent.NARROW_MOMENTS:
        assert {kept[name] for name in kept if not name.startswith("step/")} == {torch.bfloat16}
        assert {kept[name] for name in kept if name.startswith("step/")} == {torch.float32}
    again, reporter, stop = build("short", method, resume=True)
    assert again.step == short.step
    loop.train(again, reporter, stop)
    again.saver.wait()
    assert again.step == calm.step
    assert saved_state.is_finite(again)
    moments = [value for one in again.optimizer.state.values() for value in one.values()]
    assert {value.dtype for value in moments} == {torch.float32}
    wanted, got = calm.deltas.state(), again.deltas.state()
    same = all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert same == (content is CheckpointContent.WHOLE)
    away = sum(float((got[name] - wanted[name]).square().sum()) for name in wanted)
    moved = sum(float(value.square().sum()) for value in wanted.values())
    assert away < 0.25 * moved


def test_older_checkpoints_go_before_content_does(
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, reporter, stop = build("run", "dense")
    needed = _room(state, CheckpointContent.WHOLE)
    kept: list[int] = []

    def free() -> int:
        """A disk for two checkpoints and the export."""
        folders = list(state.saver.folder.glob("step-*"))
        kept.append(len(folders))
        used = sum(map(checkpoint.freed_by, folders))
        return needed + saved_state.sizes_of(state, over=False).of(CheckpointContent.WHOLE) + 100_000 - used

    _with_free(monkeypatch, free)
    loop.train(state, reporter, stop)
    state.saver.wait()
    assert max(kept) == 2
    assert len(kept) > 4
    assert checkpoint.newest(state.saver.folder, pytest.fail) is not None


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[frozenset[str]] = []
    parameters = inspect.signature(checkpoint.save)

    def full(*arguments: Any, **named: Any) -> Path:
        tried.append(parameters.bind(*arguments, **named).arguments["narrow"])
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(checkpoint, "save", full)
    job = make_job(ready_by=12.0, checkpoint_interval_s=1.0)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert len(tried) > 3
    assert (tried[0], tried[1], tried[2]) == (frozenset(), {"optimizer"}, frozenset())
    said = [line.message for line in progress_of(job) if line.message]
    failures = [text for text in said if "could not be written: [Errno 122] Disk quota exceeded" in text]
    assert len(failures) == len(tried)


def test_checkpoints_make_room_for_the_export(
    make_job: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, write = make_job(ready_by=12.0, checkpoint_interval_s=2.0), writer.write
    left: list[int] = []

    def full_at_first(*arguments: Any) -> Any:
        left.append(len(list((job.parent / "checkpoints").glob("step-*"))))
        if len(left) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(writer, "write", full_at_first)
    outcome = finish(job)
    assert outcome.status is OutcomeStatus.READY, outcome.error
    assert left == [left[0], left[0] - 1, left[0] - 2]
    assert left[0] >= 2


def test_files_with_another_name_free_nothing(tmp_path: Path) -> None:
    folder = save_step(tmp_path / "checkpoints", 1)
    size = checkpoint.freed_by(folder)
    weights = (folder / "weights.safetensors").stat().st_size
    checkpoint.link(folder, tmp_path / "kept", ["weights"])
    manifest = (folder / "manifest.json").stat().st_size
    assert checkpoint.freed_by(folder) == size - weights - manifest
    shutil.rmtree(tmp_path / "kept")
    assert checkpoint.freed_by(folder) == size
