"""One complete submission at every moment, and what upstream would object to."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.messages.runs import Outcome, OutcomeStatus
from trainer_node.contest import submission
from trainer_node.contest.best_submission import BestSubmission, Installed, is_better
from trainer_node.contest.safetensors_file import BrokenFileError, read_shapes, write_zeros
from trainer_node.contest.submission import InvalidSubmissionError, SubmissionFolder, linked, replace_folder
from trainer_node.contest.untrained_adapter import (
    NoAdapterError,
    adapter_config,
    module_shapes,
    write_untrained,
)
from trainer_node.contest.validity import objections

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "max_position_embeddings": 512,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = {"model.layers.0.self_attn.q_proj.weight": (16, 8), "model.norm.weight": (8,)}
    write_zeros(folder / "model.safetensors", shapes)
    return folder


def adapter(folder: Path, rank: int = 64) -> Path:
    folder.mkdir(exist_ok=True)
    write_zeros(folder / "adapter_model.safetensors", {"x.lora_A.weight": (rank, 8)})
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config("q_proj", "m")))
    return folder


def model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    write_zeros(folder / "model.safetensors", {"model.norm.weight": (400,)})
    return folder


def test_a_header_is_read_back(tmp_path: Path) -> None:
    shapes = {"a": (3, 5), "b": (7,), "empty": (0, 4)}
    write_zeros(tmp_path / "x.safetensors", shapes)
    assert read_shapes(tmp_path / "x.safetensors") == shapes


@pytest.mark.parametrize("size", [0, 7, 8, 20, 200, -1, 1])
def test_a_file_that_is_not_whole_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_zeros(path, {"a": (30, 5)})
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" if size == 1 else whole[:size])
    with pytest.raises(BrokenFileError):
        read_shapes(path)


def test_an_untrained_adapter_fits_the_modules(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_untrained(base, "0123456789abcdef", folder)
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    assert read_shapes(folder / "adapter_model.safetensors") == {
        f"{path}.lora_A.weight": (1, 8),
        f"{path}.lora_B.weight": (16, 1),
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["target_modules"]) == ("0123456789abcdef", ["q_proj"])


def test_a_transposed_module_is_known() -> None:
    kind, sizes = module_shapes({"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,)})
    assert (kind, sizes) == ("c_attn", {"h.0.attn.c_attn": (8, 24)})
    assert adapter_config(kind, "m")["fan_in_fan_out"] is True


@pytest.mark.parametrize("content", [None, b"", b"rubbish rubbish"])
def test_a_base_without_readable_weights_is_named(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(NoAdapterError):
        write_untrained(tmp_path, "m", tmp_path)


def test_valid_submissions_have_no_objections(base: Path, tmp_path: Path) -> None:
    assert objections(adapter(tmp_path / "adapter"), base) == []
    assert objections(model(tmp_path / "model"), base) == []


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def with_subfolder(folder: Path) -> None:
    (folder / "checkpoint-5").mkdir()
    write_zeros(folder / "checkpoint-5" / "adapter_model.safetensors", {"a": (1,)})


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncated, "bytes instead of"),
        (with_subfolder, "only the subfolder checkpoint-5"),
        (emptied, "it is empty"),
        (without("adapter_config.json"), "neither adapter_config.json nor config.json"),
        (without("adapter_model.safetensors"), "adapter_model.safetensors is missing"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "names no peft_type"),
    ],
)
def test_a_spoilt_adapter_is_objected_to(
    spoil: Callable[[Path], Any], words: str, base: Path, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "adapter")
    spoil(folder)
    assert words in "; ".join(objections(folder, base))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 16}, "hidden_size 16, the base model 8"),
        ({"architectures": ["Other"]}, "architectures"),
        ({"max_position_embeddings": 256}, "max_position_embeddings 256"),
        ({"max_position_embeddings": 1024}, ""),
    ],
)
def test_another_architecture_is_objected_to(
    changes: dict[str, Any], words: str, base: Path, tmp_path: Path
) -> None:
    found = objections(model(tmp_path / "model", **changes), base)
    assert words in "; ".join(found)
    assert bool(found) == bool(words)


def test_a_missing_shard_is_objected_to(base: Path, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert objections(folder, base) == ["model-2.safetensors is missing"]


def test_an_invalid_folder_never_becomes_the_submission(base: Path, tmp_path: Path) -> None:
    place = SubmissionFolder(tmp_path / "task" / "repo", base)
    place.prepare()
    place.install(linked(adapter(tmp_path / "good")))
    bad = adapter(tmp_path / "bad")
    truncated(bad)
    with pytest.raises(InvalidSubmissionError, match="bytes instead of"):
        place.install(linked(bad))
    assert place.objections() == []
    assert [path.name for path in place.path.parent.iterdir()] == ["repo"]


def refuse_exchanges(monkeypatch: pytest.MonkeyPatch, error: int = errno.EINVAL) -> None:
    def refuse(one: Path, other: Path) -> None:
        raise OSError(error, "no")

    monkeypatch.setattr(submission, "exchange", refuse)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_that_can_not_exchange_folders(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_exchanges(monkeypatch, error)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("new")
    (tmp_path / "old").mkdir()
    replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("ending", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_second_rename_that_does_not_happen_costs_no_submission(
    ending: BaseException, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_exchanges(monkeypatch)
    place = SubmissionFolder(tmp_path / "task" / "repo", base)
    place.prepare()
    place.install(linked(adapter(tmp_path / "one", 128)))
    rename = os.rename

    def end(old: Path, new: Path) -> None:
        if old.name.startswith(".staged"):
            raise ending
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", end)
        with pytest.raises(type(ending)):
            place.install(linked(adapter(tmp_path / "two", 64)))
    if isinstance(ending, KeyboardInterrupt):  # as a kill: what comes next is the next container's
        place.prepare()
    assert place.objections() == []
    assert read_shapes(place.path / "adapter_model.safetensors") == {"x.lora_A.weight": (128, 8)}
    assert [path.name for path in place.path.parent.iterdir()] == ["repo"]


def test_what_an_earlier_container_put_aside_is_removed_once_it_is_replaced(
    base: Path, tmp_path: Path
) -> None:
    place = SubmissionFolder(tmp_path / "task" / "repo", base)
    place.prepare()
    place.install(linked(adapter(tmp_path / "new", 64)))
    adapter(place.path.with_name(".replaced-repo"), 128)
    place.prepare()
    assert read_shapes(place.path / "adapter_model.safetensors") == {"x.lora_A.weight": (64, 8)}
    assert [path.name for path in place.path.parent.iterdir()] == ["repo"]


def _install_for_ever(target: Path, base: Path, sources: list[Path]) -> None:
    place = SubmissionFolder(target, base)
    while True:
        for source in sources:
            place.install(linked(source))


def test_killed_at_any_moment_it_is_complete(base: Path, tmp_path: Path) -> None:
    sources = [adapter(tmp_path / f"source-{rank}", rank) for rank in (64, 128, 256)]
    target = tmp_path / "task" / "repo"
    place = SubmissionFolder(target, base)
    place.prepare()
    place.install(linked(sources[0]))
    context = multiprocessing.get_context("fork")
    for number in range(30):
        process = context.Process(target=_install_for_ever, args=(target, base, sources))
        process.start()
        time.sleep(0.002 + 0.0013 * number)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert place.objections() == []
        place.prepare()


FINAL = Installed(source="final", run="auto", loss=2.0)
EARLY = Installed(source="early", run="auto", loss=1.9)
UNTRAINED = Installed(source="untrained")


@pytest.mark.parametrize(
    ("new", "old", "better"),
    [
        (UNTRAINED, None, True),
        (EARLY, None, True),
        (UNTRAINED, Installed(source="earlier container"), False),
        (EARLY, Installed(source="earlier container"), True),
        (EARLY, UNTRAINED, True),
        (Installed(source="early", run="auto", loss=3.5), UNTRAINED, False),  # the base model has 3.0
        (Installed(source="early", run="auto"), UNTRAINED, True),
        (FINAL, EARLY, True),  # its own run has chosen
        (FINAL, Installed(source="early", run="other", loss=1.9), False),
        (FINAL, Installed(source="early", run="other", loss=2.1), True),
        (Installed(source="early", run="auto"), EARLY, False),  # not measured against measured
        (Installed(source="early", run="auto", loss=1.8), EARLY, True),
        (Installed(source="early", run="auto"), Installed(source="early", run="auto"), True),
    ],
)
def test_what_replaces_what(new: Installed, old: Installed | None, better: bool) -> None:
    assert is_better(new, old, base_loss=3.0) is better


def test_an_earlier_containers_submission_stays(base: Path, tmp_path: Path) -> None:
    place = SubmissionFolder(tmp_path / "task" / "repo", base)
    place.prepare()
    place.install(linked(adapter(tmp_path / "earlier", 128)))
    best = BestSubmission(place, time.time())
    best.begin(base, "m")
    assert best.installed == Installed(source="earlier container")
    assert read_shapes(place.path / "adapter_model.safetensors") == {"x.lora_A.weight": (128, 8)}


def test_a_disk_that_refuses_leaves_what_was_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = SubmissionFolder(tmp_path / "task" / "repo", base)
    best = BestSubmission(place, time.time())
    best.begin(base, "m")
    assert best.installed == UNTRAINED

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(submission, "sync", full)
    outcome = Outcome(status=OutcomeStatus.READY)
    assert not best.offer("final", "auto", outcome, adapter(tmp_path / "export"))
    assert best.installed == UNTRAINED
    assert place.objections() == []
    assert "the disk is full" in capsys.readouterr().out
