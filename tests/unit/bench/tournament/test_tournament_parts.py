"""The bench's validator: mounts, upload rules, times and verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from bench.tournament.container import Ended
from bench.tournament.faults import FAULTS
from bench.tournament.kills import Aim, KilledAt
from bench.tournament.mounts import REPO, TASK, anonymous, prepare
from bench.tournament.play import Played, first_times, summary, unmet, verdicts
from bench.tournament.replacements import Replaced, kill_replacements
from bench.tournament.scoring import Score
from bench.tournament.tasks import CASES, rows_of
from bench.tournament.uploader import upload
from trainer_node.contest.arguments import parse
from trainer_node.contest.mounts import mounts_of


@pytest.mark.parametrize("case", CASES)
def test_the_runner_finds_what_is_mounted(case: str, tmp_path: Path) -> None:
    mounted = prepare(tmp_path, case, "tiny", 50, 0.5)
    task = parse(mounted.arguments, {**mounted.environment, "PODIUM_CONTEST_ROOT": str(tmp_path)})
    mounts = mounts_of(task)
    assert (mounts.model / "config.json").is_file()
    assert len(json.loads(mounts.data.read_text())) == 50
    assert mounts.submission == mounted.submission
    assert mounts.submission.relative_to(tmp_path).parts == ("app", "checkpoints", TASK, REPO)
    assert task.dataset_type == CASES[case].dataset_type
    assert (task.kl_coefficient is not None) == (case == "instruct_kl")


def test_a_models_name_is_hidden(tmp_path: Path) -> None:
    mounted = prepare(tmp_path, "instruct", "tiny", 10, 0.5)
    assert mounted.model.name == anonymous("tiny")
    assert len(mounted.model.name) == 16
    assert "_name_or_path" not in json.loads((mounted.model / "config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_no_test_row_is_trained_on(case: str) -> None:
    train, test = rows_of(CASES[case], 300)
    assert len(train) == 300
    assert test
    assert not [row for row in test if row in train]


def written(folder: Path, name: str = "adapter_model.safetensors", size: int = 2000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x" * size)
    return folder


def test_an_upload_names_the_real_model(tmp_path: Path) -> None:
    folder = written(tmp_path / "repo")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "0123", "r": 4}')
    (folder / "README.md").write_text("---\nbase_model: 0123\n---\n")
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "rng_state_0.pth").write_bytes(b"x")
    assert upload(folder, tmp_path / "up", "org/model") is None
    names = {path.name for path in (tmp_path / "up").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert json.loads((tmp_path / "up" / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "org/model",
        "r": 4,
    }
    assert "base_model: org/model" in (tmp_path / "up" / "README.md").read_text()


def test_a_subfolder_with_weights_is_all_that_is_uploaded(tmp_path: Path) -> None:
    folder = written(tmp_path / "repo")
    written(folder / "checkpoint-5", "model.safetensors")
    assert upload(folder, tmp_path / "up", "m") is None
    assert [path.name for path in (tmp_path / "up").iterdir()] == ["model.safetensors"]


def test_what_is_not_uploaded(tmp_path: Path) -> None:
    assert upload(tmp_path / "none", tmp_path / "up", "m") == "there is no submission folder"
    small = written(tmp_path / "small", "config.json", 1024)
    assert upload(small, tmp_path / "up", "m") == "empty, or only metadata"
    ignored = written(tmp_path / "ignored", "optimizer.pt")
    assert upload(ignored, tmp_path / "up", "m") == "empty, or only metadata"


@pytest.mark.parametrize(("status", "uploads"), [(None, True), (0, True), (1, False), (137, False)])
def test_an_exit_status_decides_on_the_upload(status: int | None, uploads: bool) -> None:
    assert Ended(status, 1.0).uploads is uploads


def test_times_are_read_from_the_log(tmp_path: Path) -> None:
    mounted = prepare(tmp_path, "instruct", "tiny", 10, 0.5)
    (tmp_path / "log").write_text(
        "x [info] submission in place after_s=0.9 loss=None source=untrained\n"
        "x [info] submission in place after_s=12.5 loss=3.1 source=early\n"
        "x [info] submission in place after_s=50.1 loss=3.0 source=final\n"
    )
    assert first_times(mounted) == (0.9, 12.5)
    (tmp_path / "log").write_text("")
    assert first_times(mounted) == (None, None)


@pytest.mark.parametrize(
    ("attempts", "wrong"), [((1, 2, 3), False), ((1, 2, 2), False), ((1, 2), True), ((1,), True)]
)
def test_two_deaths_of_a_worker_are_two_more_starts(attempts: tuple[int, ...], wrong: bool) -> None:
    log = "".join(f"[info] worker started   attempt={number} pid=3\n" for number in attempts)
    assert bool(unmet(FAULTS["worker killed"], log, 12.0)) is wrong


def played(entry: str, losses: list[float] | None) -> Played:
    score = None if losses is None else Score(losses, sum(losses) / len(losses), 9.0)
    wrong = [] if score else ["exit status 1"]
    return Played("instruct", entry, 0, 60.0, 1.0, 10.0, wrong, score)


def test_verdicts_follow_upstreams_rules() -> None:
    good, bad = played("a", [1.0] * 100), played("b", [2.0] * 100)
    (found,) = verdicts([good, bad])
    assert (found["group"], found["knockout"], found["boss"]) == (True, True, True)
    (found,) = verdicts([bad, good])
    assert (found["group"], found["knockout"], found["boss"]) == (False, False, False)


def test_an_entry_without_a_submission_loses() -> None:
    good = played("b", [1.0] * 10)
    assert verdicts([played("a", None), good]) == [{"case": "instruct", "winner": "b"}]
    assert verdicts([good, played("a", None)]) == [{"case": "instruct", "winner": "b"}]


def test_the_summary_counts() -> None:
    killed = replace(played("a", [1.0]), killed=KilledAt(Aim.REPLACEMENT, 3, False, True))
    figures = summary([played("a", [1.0]), played("a", None)], [killed], 60.0)
    assert figures == {
        "containers": 2,
        "valid": 1,
        "below_base": 1,
        "worst_difference": 0.0,
        "first_within_a_tenth": 2,
        "kills": 1,
        "valid_after_kills": 1,
        "training_when_killed": 1,
        "exporting_when_killed": 0,
        "replacing_when_killed": 1,
        "trained_after_kills": 1,
    }


def test_kills_in_a_replacement_are_counted() -> None:
    found = kill_replacements(5, 0)
    assert found == Replaced(5, 5, found.interrupted)
