"""`podium train`, from its arguments to its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from podium.__main__ import main, parser
from podium.commands import train
from podium.training_config import TrainConfig
from shared.errors import PodiumError, SettingsError
from shared.messages.runs import decode_outcome
from tests.integration.gateway.test_tracking import READ

COLUMNS = '{"field_instruction": "q", "field_output": "a"}'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"q": f"Number {i % 37}?", "a": f"After {i % 37 - 1}."} for i in range(200)]))
    return path


def _arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    line = ["train", "--model", str(model), "--model-id", "upstream/tiny", "--data", str(data)]
    return [*line, "--dataset-type", COLUMNS, "--hours", "1m", "--out", str(out), "--threads", "1", *more]


def _parsed(model: Path, data: Path, out: Path, *more: str) -> TrainConfig:
    return train.config_of(parser().parse_args(_arguments(model, data, out, *more)))


def test_trains_to_an_outcome_and_repeats_it(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(_arguments(tiny_model, data, out)) == 0
    said = capsys.readouterr()
    outcome = decode_outcome(said.out.splitlines()[-1].encode())
    assert outcome.metrics is not None
    assert outcome.metrics.final_loss is not None
    assert outcome.metrics.base_loss is not None
    assert outcome.metrics.final_loss < outcome.metrics.base_loss
    assert (out / "export" / "README.md").exists()
    assert "train" in said.err
    assert "plan:" in said.err
    assert main(_arguments(tiny_model, data, out)) == 0
    assert decode_outcome(capsys.readouterr().out.encode()) == outcome
    run = tracked(out, tmp_path / "trackio")
    assert len([row for row in run["rows"] if "train/loss" in row]) > 1
    assert [row["result/held_out_loss"] for row in run["rows"] if "result/held_out_loss" in row] == [
        outcome.metrics.final_loss
    ]
    config = run["config"]
    assert (config["model"], config["result.status"]) == ("upstream/tiny", "ready")
    assert (config["plan.profile"], config["plan.devices"]) == ("auto", 1)
    assert config["plan.expected_steps"] > 0
    assert any(name.startswith("plan.deviation.") for name in config)


def tracked(out: Path, folder: Path) -> Any:
    """Return the one run that trackio has after `podium track --run`, twice: the second writes nothing."""
    environment = os.environ | {"TRACKIO_DIR": str(folder)}
    track = ["-m", "podium", "track", "--run", str(out)]
    *_, read = [
        subprocess.run([sys.executable, *words], env=environment, capture_output=True, timeout=60, check=True)
        for words in (track, track, ["-c", READ])
    ]
    (run,) = json.loads(read.stdout)
    keys = [(row["timestamp"], tuple(sorted(row))) for row in run["rows"]]
    assert len(set(keys)) == len(keys)
    return run


def test_a_failed_run_says_why(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_arguments(tiny_model, tmp_path / "none.json", tmp_path / "run")) == 1
    assert "none.json" in capsys.readouterr().err


def test_a_folder_of_another_run_is_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    job = train.job_from(_parsed(tiny_model, data, tmp_path / "run"))
    assert train.job_from(_parsed(tiny_model, data, tmp_path / "run", "--hours", "9m")) == job
    whole = (tmp_path / "run" / "job.json").read_bytes()
    (tmp_path / "run" / "job.json").write_bytes(b'{"task": "\xff"}')
    with pytest.raises(PodiumError, match="is no job of a `podium train`"):
        train.job_from(_parsed(tiny_model, data, tmp_path / "run"))
    (tmp_path / "run" / "job.json").write_bytes(whole)
    with pytest.raises(SettingsError, match="another model"):
        train.job_from(_parsed(tiny_model, data, tmp_path / "run", "--profile", "lora_r16"))
    with pytest.raises(SettingsError, match="kl_coef"):
        train.job_from(_parsed(tiny_model, data, tmp_path / "run", "--kl-coef", "0.5"))


def test_a_divergence_is_asked_for_by_its_coefficient(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    job = train.job_from(_parsed(tiny_model, data, tmp_path / "run", "--kl-coef", "0.5"))
    assert job.kl_coefficient == 0.5
    assert train.job_from(_parsed(tiny_model, data, tmp_path / "other")).kl_coefficient == 0.0
    with pytest.raises(SettingsError, match="kl_coef"):
        _parsed(tiny_model, data, tmp_path / "third", "--kl-coef", "-1")
    with pytest.raises(SettingsError, match="preference pairs have no divergence"):
        _parsed(tiny_model, data, tmp_path / "third", "--kl-coef", "0.5", "--task-type", "DpoTask")


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_preview_shows_what_is_trained(
    tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: tuple[str, ...]
) -> None:
    assert main(_arguments(tiny_model, data, tmp_path / "run", "--preview", "2", *form)) == 0
    said = capsys.readouterr().out
    if form:
        found = json.loads(said)
        assert (found["task_type"], found["rows"], len(found["first"])) == ("InstructTextTask", 200, 2)
        trained = "".join(span["text"] for span in found["first"][1]["spans"] if span["trained"])
        shown = "".join(span["text"] for span in found["first"][1]["spans"])
        assert "After 0." in trained
        assert "Number 1?" not in trained
        assert "Number 1?" in shown
        assert 0 < found["trained_tokens"] < found["tokens"]
    else:
        assert "tokens are trained" in said
        assert "[[" in said
    assert not (tmp_path / "run").exists()
