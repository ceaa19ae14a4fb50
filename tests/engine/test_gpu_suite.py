"""`python -m bench gpu`: ready for the first machine with a GPU, because all of it runs dry on a CPU."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import older_torch, suite
from bench.gpu.check import Answer, Finding, Setting
from bench.gpu.suite import CHECKS, Entry, read_answers, run_suite
from bench.gpu.training import Case, Training
from tests.engine.worker_run import ENVIRONMENT, ROOT
from trainer_node.engine.model import attention

DRY_S = 1800  # two minutes on two idle cores


@pytest.mark.slow
@pytest.mark.timeout(DRY_S + 60)
def test_every_check_passes_dry(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "gpu", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=DRY_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["failed"] == []
    assert set(last["skipped"]) <= {"trl"}
    answers = read_answers(tmp_path)
    assert list(answers) == list(CHECKS)
    assert answers["sharded_worker"].figures["parallel"] == "fsdp2"
    assert answers["worker"].figures["dense"]["metrics"]["resumes"] == 1
    assert answers["compile"].figures["llama-1b, dense, 16384 tokens"]["graphs"] > 0


@pytest.mark.parametrize("lag", [0, 1])
def test_every_step_has_its_own_loss_however_late_it_is_read(lag: int, tmp_path: Path) -> None:
    training = Training(Case(model="smollm2-135m"), Setting(dry=True, folder=tmp_path))
    training.state.lag, training.state.step_losses = lag, []
    losses = training.steps(3)["losses"]
    assert losses == [round(loss, 4) for loss in training.state.step_losses]
    assert len(set(losses)) == 4


def test_an_answer_is_kept_and_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "rates", Entry(lambda setting: Finding({"turn": 1}), 20))
    first = run_suite(["rates"], tmp_path, dry=True, seconds=60)
    monkeypatch.setitem(CHECKS, "rates", Entry(lambda setting: Finding({"turn": 2}), 20))
    again = run_suite(["rates"], tmp_path, dry=True, seconds=60)
    assert first["ok"] == again["ok"] == 1
    assert read_answers(tmp_path)["rates"].figures == {"turn": 1}


def test_no_check_begins_without_time_for_it(tmp_path: Path) -> None:
    found = run_suite(["rates"], tmp_path, dry=True, seconds=suite.LEAST_S - 1)
    assert (found["ok"], found["skipped"]) == (0, ["rates"])
    assert read_answers(tmp_path) == {}


def test_a_failed_check_fails_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Answer(status="failed", seconds=1.0, faults=["wrong"])
    monkeypatch.setattr(suite, "run_check", lambda *_, **__: failed)
    monkeypatch.setattr(sys, "argv", ["gpu", "rates", "--dry", "--out", str(tmp_path)])
    assert suite.main() == 1


def test_the_limits_leave_the_most_valuable_checks_their_time() -> None:
    """Up to the kernels every check can take its limit: what is cut off is a figure, not an answer."""
    names = list(CHECKS)
    first = names[: names.index("compile")]
    assert sum(CHECKS[name].limit_s for name in first if name != "layouts") <= suite.WHOLE_S


def test_an_older_torch_gets_the_kernel_below_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(query: object, key: object, value: object, cu_seq_q: object) -> None: ...

    assert not older_torch.lacks_groups()
    assert older_torch.patch() == []
    order = list(attention._KERNELS)
    monkeypatch.setattr(older_torch, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_KERNELS", dict(attention._KERNELS))
    assert older_torch.patch() == [older_torch.OLD]
    assert list(attention._KERNELS) == order
    kernel = attention._KERNELS[older_torch.OLD]()
    assert list(inspect.signature(kernel).parameters) == ["q", "k", "v", "cu", "longest", "scale", "window"]
