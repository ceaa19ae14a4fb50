"""What was seen once is known as long as it could pass again, and not longer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.upstream.nonces import BUCKET_S, WINDOW_S, Nonces, Seen, TooManyNoncesError, nonce_key

NOW = 1_700_000_000.0


def test_a_nonce_counts_once_for_each_validator() -> None:
    seen = Seen()
    assert seen.add(nonce_key("v", "1_a", NOW))
    assert not seen.add(nonce_key("v", "1_a", NOW))
    assert seen.add(nonce_key("w", "1_a", NOW))
    assert seen.add(nonce_key("v", "1_b", NOW))


@given(st.floats(0, WINDOW_S), st.floats(0, 2 * WINDOW_S))
def test_it_is_known_while_it_could_pass(ahead: float, later: float) -> None:
    seen, signed_at = Seen(), NOW + ahead
    key = nonce_key("v", "1_a", signed_at)
    seen.add(key)
    seen.forget(NOW + later)
    if abs(NOW + later - signed_at) <= WINDOW_S:
        assert key in seen
    if later > ahead + WINDOW_S + BUCKET_S:
        assert key not in seen
        assert len(seen) == 0


def test_the_store_is_bounded_and_has_room_again() -> None:
    seen = Seen(most=3)
    for number in range(3):
        seen.add(nonce_key("v", str(number), NOW))
    with pytest.raises(TooManyNoncesError, match="retry later"):
        seen.add(nonce_key("v", "3", NOW))
    assert not seen.add(nonce_key("v", "2", NOW))  # one that is known needs no room
    seen.forget(NOW + WINDOW_S + 2 * BUCKET_S)
    assert len(seen) == 0
    assert seen.add(nonce_key("v", "3", NOW))


async def test_without_a_broker_a_gateway_knows_what_it_saw_itself_and_says_no_more() -> None:
    nonces = Nonces("g")
    assert not nonces.seen("v", "1_a", NOW)
    first = nonces.claim("v", "1_a", NOW)
    assert first is not None
    assert not first.done()
    assert nonces.seen("v", "1_a", NOW)
    assert nonces.claim("v", "1_a", NOW) is None
