from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from podium.demo.report import Played, Row, compare, report, take_result
from shared.messages.jobs import Result, ResultStatus
from shared.messages.runs import Metrics


def result(**fields: Any) -> Result:
    values: dict[str, Any] = {
        "record_id": "r",
        "task": "t",
        "task_id": "t",
        "slot": "a",
        "status": ResultStatus.SUBMITTED,
        "artifact": "/x/submission",
        "metrics": Metrics(base_loss=4.0, final_loss=2.0, tokens_per_s=90.0),
        "deadline_margin_s": 12.0,
    }
    return Result(**values | fields)


def won(**fields: Any) -> Row:
    row = Row(task="t", expected=True, slot="a", accepted=True, reason="Accepted", as_expected=True)
    take_result(row, result(**fields))
    row.base_loss, row.final_loss = 4.0, 3.0
    return row


def test_a_row_is_well_up_to_the_ratio_that_must_be_reached() -> None:
    row = won()
    assert row.trouble == ""
    row.final_loss = 3.01
    assert "0.75 of base loss" in row.trouble


@pytest.mark.parametrize(
    ("row", "trouble"),
    [
        (won(deadline_margin_s=-1.0), "after its deadline"),
        (won(status=ResultStatus.FAILED, reason="no data"), "failed: no data"),
        (Row(task="t", expected=True, accepted=True, as_expected=True), "no result"),
        (Row(task="t", expected=False, accepted=True), "not the expected decision"),
    ],
)
def test_what_is_not_well_is_said(row: Row, trouble: str) -> None:
    assert trouble in row.trouble


def test_a_loss_that_is_no_number_is_never_well() -> None:
    row = won()
    row.final_loss = float("nan")
    assert row.trouble


def test_last_line_is_json_and_ok_only_if_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    refused = Row(task="no", expected=False, reason="Job [duration] too long", as_expected=True)
    for overlap_s, ok in ((5.0, True), (0.0, False)):
        played = Played(rows=[refused, won()], overlap_s=overlap_s)
        report(Console(width=150), played)
        assert played.well is ok
        output = capsys.readouterr().out
        assert "Job [duration] too long" in output
        last = json.loads(output.strip().splitlines()[-1])
        assert last["ok"] is ok
        assert last["overlap_s"] == overlap_s
        assert last["tasks"][1] == {
            "task": "t",
            "slot": "a",
            "accepted": True,
            "reason": "Accepted",
            "base_loss": 4.0,
            "final_loss": 3.0,
            "deadline_margin_s": 12.0,
            "artifact": "/x/submission",
        }


def test_profiles_are_compared_by_the_losses_of_their_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    refused = Row(task="no", expected=False, reason="too long", as_expected=True)
    first, second, unscored = won(), won(), won()
    second.final_loss, unscored.base_loss = 2.5, None
    plain = Played(rows=[refused, first], overlap_s=5.0, seconds=300.04)
    compare(Console(width=150), {"plain": plain, "auto": Played(rows=[second, refused], overlap_s=5.0)})
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last == {
        "ok": True,
        "losses": {"t": {"base": 4.0, "plain": 3.0, "auto": 2.5}},
        "seconds": {"plain": 300.0, "auto": 0.0},
    }
    unscored.final_loss = None
    compare(Console(width=150), {"plain": Played(rows=[unscored], overlap_s=5.0), "auto": plain})
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["ok"] is False
    assert last["losses"] == {"t": {"base": 4.0, "plain": None, "auto": 3.0}}
