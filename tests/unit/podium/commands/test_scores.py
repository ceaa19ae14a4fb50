"""Upstream's breakdowns and our own scores, in every shape of file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.learning.score_form import parse_scores
from gateway.views.schemas import TablesView
from podium.commands.scores import read_scores, summary
from shared.errors import PodiumError

ME, OTHER = "5Me", "5Other"


def result(hotkey: str, quality: Any, **fields: Any) -> dict[str, Any]:
    values = {"hotkey": hotkey, "quality_score": quality, "test_loss": 1.1, "synth_loss": 1.2}
    return values | {"score_reason": "Ranked 1st by weighted loss"} | fields


def breakdown(task: str, *results: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"id": task, "miner_results": list(results)} | fields


TWO = breakdown("t1", result(OTHER, 0), result(ME, 3))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(TWO),
        json.dumps([TWO], indent=2),
        json.dumps(TWO) + "\n\n" + json.dumps(breakdown("t2", result(OTHER, 3))) + "\n",
    ],
)
def test_a_breakdown_is_read_for_ones_own_hotkey(text: str) -> None:
    read = read_scores(text, "file", ME)
    assert read.forms == [
        {
            "task_id": "t1",
            "quality_score": 3,
            "test_loss": 1.1,
            "synth_loss": 1.2,
            "reason": "Ranked 1st by weighted loss",
        }
    ]
    assert len(read.notes) == ("t2" in text)


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf"), "NaN"])
def test_losses_that_are_no_numbers_are_left_out(loss: Any) -> None:
    text = json.dumps(breakdown("t1", result(ME, -1, test_loss=loss, synth_loss=loss, score_reason=None)))
    (form,) = read_scores(text, "file", None).forms
    assert form == {"task_id": "t1", "quality_score": -1, "reason": ""}


def test_own_forms_pass_through_and_type_and_model_are_taken_where_upstream_tells_them() -> None:
    own = {"task_id": "t0", "quality_score": 0, "test_loss": float("nan"), "synth_loss": None}
    upstream_form = breakdown("t1", result(ME, 3), task_type="DpoTask", model_id="org/m")
    read = read_scores(json.dumps([own, upstream_form]), "file", ME)
    assert [(form["task_id"], form.get("model"), form.get("task_type")) for form in read.forms] == [
        ("t0", None, None),
        ("t1", "org/m", "DpoTask"),
    ]
    assert [form.test_loss for form in parse_scores(json.dumps(read.forms).encode(), 1e10)] == [None, 1.1]


def test_what_is_not_scored_or_not_ours_is_noted() -> None:
    unscored = [breakdown("t1", result(ME, None)), breakdown("t2", result(ME, float("nan")))]
    foreign = [breakdown("t3", result(OTHER, 3)), breakdown("t4"), {"id": "t5", "miner_results": None}]
    read = read_scores(json.dumps(unscored + foreign), "file", ME)
    assert read.forms == []
    assert read.notes == [
        "task t1: not scored yet",
        "task t2: not scored yet",
        *(f"task {task}: no result of 5Me" for task in ("t3", "t4", "t5")),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "file is neither JSON nor JSON lines"),
        ("{}\n{", "file is neither JSON nor JSON lines"),
        ("[" * 100_000, "file is neither JSON"),
        ("{}\n" + "[" * 100_000, "file is neither JSON"),
        ("[1]", "file, item 0: neither upstream's breakdown"),
        ('[{"id": "t"}]', "file, item 0: neither upstream's breakdown"),
        ('{"id": 7, "miner_results": []}', "a breakdown has an id and a list"),
        ('{"id": "t", "miner_results": {}}', "a breakdown has an id and a list"),
        (json.dumps(TWO), "2 miners have results of task t1; choose one with --hotkey"),
    ],
)
def test_what_can_not_be_read_says_where(text: str, said: str) -> None:
    with pytest.raises(PodiumError) as raised:
        read_scores(text, "file", None)
    assert said in str(raised.value)


def test_results_that_are_no_evidence_are_named() -> None:
    view = TablesView(
        policy="house", prior_strength=10, half_life_days=30, results=9, unused_results=2, scores=5, tables={}
    )
    assert "evidence of 9 results and 5 scores" in summary(view)
    assert "2 more results are no evidence (cancelled, or bad_data without a score)" in summary(view)
