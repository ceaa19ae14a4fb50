"""Scores as they are posted: every form, and every way to be refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from gateway.errors import MalformedScoreError, UnknownScoredTaskError
from gateway.learning.score_form import ScoreForm, parse_scores, same, score_of
from gateway.state.ledger import Ledger
from shared import subjects
from shared.broker.bus import Record
from shared.messages.encoding import encode
from shared.messages.jobs import Job, Reservation, decode_score
from shared.messages.offers import BareOffer, Decision, Offer, TaskType

NOW = 1_800_000_000.0
OFFER = Offer(task_id="t", task_type=TaskType.DPO, model="org/m-7b", hours_to_complete=2, dataset="d")
DECISION = Decision(task_id="t", task="t", accepted=True, reason="yes", slot="a")


def ledger(message: Job | Reservation) -> Ledger:
    made = Ledger()
    subject = (subjects.job if isinstance(message, Job) else subjects.reservation)(message.slot, message.task)
    made.apply(subjects.JOBS_STREAM, Record(1, subject, encode(message)))
    return made


ACCEPTED = ledger(
    Job(
        record_id="j",
        task_id="t",
        task="t",
        slot="a",
        gateway="g",
        offer=OFFER,
        decision=DECISION,
        received_at=1.0,
        deadline_at=2.0,
    )
)


def parsed(value: Any) -> list[ScoreForm]:
    return parse_scores(value if isinstance(value, bytes) else json.dumps(value).encode(), NOW)


def test_one_score_or_a_list() -> None:
    one = {"task_id": "t", "quality_score": 3, "test_loss": 1.5, "unknown": [1]}
    assert parsed(one) == parsed([one]) == [ScoreForm(task_id="t", quality_score=3.0, test_loss=1.5)]
    assert parsed([]) == []


@pytest.mark.parametrize("loss", [None, math.nan, math.inf, -math.inf, "NaN", "inf", "-Infinity"])
def test_a_loss_that_is_no_number_counts_as_not_measured(loss: Any) -> None:
    (form,) = parsed({"task_id": "t", "quality_score": -1, "test_loss": loss, "synth_loss": loss})
    assert (form.test_loss, form.synth_loss) == (None, None)
    score = score_of(form, ACCEPTED, NOW)
    assert decode_score(encode(score)) == score


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "Expecting value"),
        (b"\xff", "decode"),
        (b"[" * 100_000, "a score is a JSON object"),
        (b"3", "Expected `object`"),
        (b'{"quality_score": 3}', "`task_id`"),
        ({"task_id": "t"}, "`quality_score`"),
        ({"task_id": "t", "quality_score": None}, "$.quality_score"),
        ({"task_id": "t", "quality_score": math.nan}, "quality_score is nan"),
        ({"task_id": "t", "quality_score": math.inf}, "quality_score is inf"),
        ({"task_id": "t", "quality_score": "3"}, "$.quality_score"),
        ({"task_id": "", "quality_score": 3}, "$.task_id"),
        ({"task_id": "t", "quality_score": 3, "test_loss": "low"}, "$.test_loss"),
        ({"task_id": "t", "quality_score": 3, "task_type": "MusicTask"}, "$.task_type"),
        ({"task_id": "t", "quality_score": 3, "scored_at": -1}, "$.scored_at"),
        ({"task_id": "t", "quality_score": 3, "scored_at": NOW * 1000}, "not in the future"),
        ({"task_id": "t", "quality_score": 3, "scored_at": math.nan}, "scored_at"),
        ([{"task_id": "t", "quality_score": 3}, {"task_id": "u"}], "score 1: "),
        ([[]], "score 0: "),
        (b'{"task_id": "\\ud800", "quality_score": 3}', "surrogates not allowed"),
        (b'{"task_id": "t", "quality_score": 3, "task_type": "\\ud800"}', "surrogates not allowed"),
        (b'{"task_id": "t", "quality_score": 1' + b"0" * 400 + b"}", "out of range"),
    ],
)
def test_what_is_no_score_is_refused_with_what_is_needed(body: Any, said: str) -> None:
    with pytest.raises(MalformedScoreError) as raised:
        parsed(body)
    assert said in str(raised.value)


def test_a_loss_with_hundreds_of_digits_counts_as_not_measured() -> None:
    body = b'{"task_id": "t", "quality_score": 3, "test_loss": 1' + b"0" * 400 + b"}"
    assert parsed(body)[0].test_loss is None


def test_of_an_accepted_task_the_log_says_what_it_was() -> None:
    form = ScoreForm(task_id="t", quality_score=0.0, task_type=TaskType.IMAGE, model="other", reason="so")
    score = score_of(form, ACCEPTED, NOW)
    assert (score.task_type, score.model, score.reason, score.scored_at) == ("DpoTask", "org/m-7b", "so", NOW)


def test_of_a_reserved_task_too() -> None:
    bare = BareOffer(task_id="t", task_type=TaskType.CHAT, model="org/r", hours_to_complete=2)
    values: dict[str, Any] = {"record_id": "r", "task_id": "t", "task": "t", "slot": "a", "gateway": "g"}
    values |= {"reserved_at": 1.0, "expires_at": 2.0, "decision": DECISION}
    form = ScoreForm(task_id="t", quality_score=-1.0)
    assert score_of(form, ledger(Reservation(**values, offer=bare)), NOW).model == "org/r"
    with pytest.raises(UnknownScoredTaskError):  # stored by a version that didn't keep the offer
        score_of(form, ledger(Reservation(**values)), NOW)


def test_a_task_that_was_never_accepted_must_be_described() -> None:
    with pytest.raises(UnknownScoredTaskError, match=r"'x/y' was never accepted .* task_type and model"):
        score_of(ScoreForm(task_id="x/y", quality_score=3.0, model="org/m"), Ledger(), NOW)
    form = ScoreForm(task_id="x/y", quality_score=3.0, model="org/m", task_type=TaskType.CHAT, scored_at=7.0)
    score = score_of(form, Ledger(), NOW)
    assert (score.task, score.scored_at) == (subjects.task_key("x/y"), 7.0)


def test_the_same_score_is_known_again_whenever_it_is_sent() -> None:
    first = score_of(ScoreForm(task_id="t", quality_score=3.0, test_loss=1.0), ACCEPTED, NOW)
    again = score_of(ScoreForm(task_id="t", quality_score=3.0, test_loss=1.0), ACCEPTED, NOW + 99)
    assert same(first, again, dated=False)
    assert not same(first, again, dated=True)  # the sender says when, and it is another time
    other = score_of(ScoreForm(task_id="t", quality_score=0.0, test_loss=1.0), ACCEPTED, NOW)
    assert not same(first, other, dated=False)
