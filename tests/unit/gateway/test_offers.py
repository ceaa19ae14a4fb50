"""Bytes that are no offer: every error is one kind, and names the field."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import MalformedOfferError
from gateway.offers import parse_offer
from shared.messages.offers import Offer

VALID = (
    b'{"task_id":"t","task_type":"InstructTextTask","model":"m","hours_to_complete":2,"dataset":"d","new":1}'
)


def test_an_offer_with_an_unknown_field_is_an_offer() -> None:
    assert parse_offer(VALID).hours_to_complete == 2.0


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "truncated"),
        (b"{}", "task_id"),
        (VALID.replace(b"2", b"1e999"), "$.hours_to_complete"),
        (VALID.replace(b"2", b"NaN"), "malformed"),
        (VALID.replace(b'"t"', b'"\\ud800"'), "surrogate"),
        (VALID.replace(b'"t"', b'"\xff"'), "utf-8"),
        (VALID.replace(b'"new":1', b'"new":' + b"[" * 100_000), "nested too deeply"),
    ],
)
def test_what_is_no_offer_says_why_and_what_is_needed(body: bytes, said: str) -> None:
    with pytest.raises(MalformedOfferError, match="an offer is a JSON object with task_id") as caught:
        parse_offer(body)
    assert said in str(caught.value)


@given(
    st.binary(max_size=200) | st.integers(0, len(VALID)).map(lambda n: VALID[:n] + b"\x00" + VALID[n + 1 :])
)
def test_any_bytes_are_an_offer_or_malformed(body: bytes) -> None:
    try:
        offer = parse_offer(body)
    except MalformedOfferError:
        return
    assert isinstance(offer, Offer)
