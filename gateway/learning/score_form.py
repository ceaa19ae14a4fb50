"""Upstream's posted scores: bytes -> forms -> stored records. Pure."""

from __future__ import annotations

import json
import uuid
from math import isfinite
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from gateway.errors import MalformedScoreError, UnknownScoredTaskError
from gateway.state.ledger import Ledger
from shared import subjects
from shared.messages.jobs import Score
from shared.messages.offers import BareOffer, TaskType

NEEDED = (
    "a score is a JSON object with task_id and quality_score (3 = first place, 0 = another valid one, "
    "-1 = none), or a list of them; test_loss, synth_loss, reason and scored_at may be given"
)
MOST_AHEAD_S = 600.0  # how far a sender's clock may be ahead


class ScoreForm(Struct, frozen=True, kw_only=True):
    """A posted score."""

    task_id: Annotated[str, Meta(min_length=1, max_length=1024)]
    quality_score: float
    test_loss: float | None = None
    synth_loss: float | None = None
    reason: Annotated[str, Meta(max_length=2000)] | None = None
    scored_at: Annotated[float, Meta(gt=0)] | None = None
    task_type: TaskType | None = None  # these two only for tasks that this fleet never accepted
    model: Annotated[str, Meta(min_length=1, max_length=512)] | None = None


def parse_scores(body: bytes, now: float) -> list[ScoreForm]:
    """Parse one form or a list of them. Losses that are not finite count as not measured.

    Raises MalformedScoreError naming the field, and in a list the index.
    """
    try:
        raw = json.loads(body)  # the standard library's, as Python writes NaN and Infinity into JSON
    except (ValueError, RecursionError) as error:
        raise MalformedScoreError(f"{error}; {NEEDED}") from error
    several = isinstance(raw, list)
    return [
        _form(each, f"score {index}: " if several else "", now)
        for index, each in enumerate(raw if several else [raw])
    ]


def _form(raw: Any, where: str, now: float) -> ScoreForm:
    if isinstance(raw, dict):
        raw = raw | {name: finite(raw[name]) for name in ("test_loss", "synth_loss") if name in raw}
    try:
        form = msgspec.convert(raw, ScoreForm)
        msgspec.json.encode(form)  # the standard library accepts a lone surrogate, which can't be encoded
    except (msgspec.ValidationError, UnicodeError) as error:
        raise MalformedScoreError(f"{where}{error}; {NEEDED}") from error
    if not isfinite(form.quality_score):
        raise MalformedScoreError(f"{where}quality_score is {form.quality_score}; {NEEDED}")
    if form.scored_at is not None and not form.scored_at < now + MOST_AHEAD_S:
        raise MalformedScoreError(
            f"{where}scored_at must be Unix seconds and not in the future, not {form.scored_at}"
        )
    return form


def finite(loss: Any) -> Any:
    """Return a loss, or None for NaN and infinities, also in quotes; other values are refused later."""
    if isinstance(loss, str):
        try:
            loss = float(loss)
        except ValueError:
            return loss
    try:
        return None if isinstance(loss, int | float) and not isfinite(loss) else loss
    except OverflowError:  # an integer with hundreds of digits
        return None


def score_of(form: ScoreForm, ledger: Ledger, now: float) -> Score:
    """Return the record to store; for an accepted task it has the job's own type and model.

    Raises UnknownScoredTaskError.
    """
    key = subjects.task_key(form.task_id)
    task_type, model = _subject_of(form, accepted_offer(ledger, key))
    return Score(
        record_id=uuid.uuid4().hex,
        task_id=form.task_id,
        task=key,
        task_type=task_type,
        model=model,
        quality_score=form.quality_score,
        test_loss=form.test_loss,
        synth_loss=form.synth_loss,
        reason=form.reason or "",
        scored_at=now if form.scored_at is None else form.scored_at,
        at=now,
    )


def accepted_offer(ledger: Ledger, key: str) -> BareOffer | None:
    """Return the offer that was accepted under a key, if the log has it."""
    task = ledger.task(key)
    return task.record.offer if task is not None else None


def _subject_of(form: ScoreForm, offer: BareOffer | None) -> tuple[TaskType, str]:
    if offer is not None:
        return offer.task_type, offer.model
    if form.task_type is None or form.model is None:
        raise UnknownScoredTaskError(
            f"task {form.task_id[:100]!r} was never accepted by this fleet: "
            "its score must give task_type and model"
        )
    return form.task_type, form.model


def same(stored: Score, score: Score, *, dated: bool) -> bool:
    """Return whether a score equals the stored one; its time counts only if the sender gave one."""

    def fields(each: Score) -> tuple[Any, ...]:
        losses = (each.quality_score, each.test_loss, each.synth_loss)
        return (
            *losses,
            each.reason,
            each.task_id,
            each.task_type,
            each.model,
            each.scored_at if dated else None,
        )

    return fields(stored) == fields(score)
