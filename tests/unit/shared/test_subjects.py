"""Task tokens are safe wherever they are used."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import subjects


@pytest.mark.parametrize("task_id", ["7", "a-b_C9", "6f1c2d3e-0000-4000-8000-000000000000", "x" * 64])
def test_a_safe_id_is_its_own_token(task_id: str) -> None:
    assert subjects.task_key(task_id) == task_id


@pytest.mark.parametrize(
    "task_id", ["../../x", "a.b", "*", ">", "a b", "x" * 65, "x" * 300, "\u00e4", "a\n", ""]
)
def test_any_other_id_is_hashed(task_id: str) -> None:
    assert re.fullmatch(r"x[0-9a-f]{32}", subjects.task_key(task_id))


@given(st.text(), st.text())
def test_tokens_are_always_safe_and_tell_ids_apart(one: str, other: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", subjects.task_key(one))
    assert (subjects.task_key(one) == subjects.task_key(other)) == (one == other)


def test_subjects_are_spelled_as_documented() -> None:
    assert subjects.job("a", "t") == "podium.jobs.a.t"
    assert subjects.reservation("a", "t") == "podium.reservations.a.t"
    assert subjects.state("b", "t") == "podium.state.b.t"
    assert subjects.progress("b", "t") == "podium.progress.b.t"
    assert subjects.heartbeat("b") == "podium.heartbeats.b"
    assert subjects.control("b") == "podium.control.b"
    assert subjects.lease("b") == "$KV.leases.b"
