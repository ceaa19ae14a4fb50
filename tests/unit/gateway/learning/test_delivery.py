"""Delivery rates of pairs: own trials, relatives, and that one pair never condemns its relatives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.learning.delivery import MOST_OF_ONE_PAIR, Counts, delivery_table
from gateway.learning.rates import ANY_OTHER, LearnedRates, Rate, Table, pair_key

HOUSE, STRENGTH = 0.9, 10.0
CHAT, DPO = "ChatTask", "DpoTask"


def table(**counts: tuple[float, float]) -> Table:
    """Return the table of counts given as `ChatTask__llama=(successes, trials)`."""
    pairs = {(name.partition("__")[0], name.partition("__")[2]): Counts(*of) for name, of in counts.items()}
    return delivery_table(pairs, HOUSE, STRENGTH)


def rate(made: Table, task_type: str, family: str) -> Rate:
    return made.learned[pair_key(task_type, family)]


def test_without_evidence_there_are_only_house_values() -> None:
    assert table() == Table(HOUSE)
    assert LearnedRates(delivery=table()).delivery_of(CHAT, "llama") == Rate(
        HOUSE, "house value for ChatTask, any other family"
    )


def test_a_pair_has_its_own_trials_on_top_of_the_house_value() -> None:
    found = rate(table(ChatTask__gemma=(0, 100)), CHAT, "gemma")
    assert found.value == pytest.approx(9 / 110)
    assert found.spread == pytest.approx((9 / 110 * 101 / 110 / 111) ** 0.5)
    assert (found.successes, found.trials) == (0, 100)
    assert found.cause == (
        "0.0 of 100.0 of ChatTask with gemma delivered (with other families 0.0 of 0.0, in other types "
        "0.0 of 0.0; prior 0.900 of 10 trials)"
    )


def test_one_pair_counts_for_a_few_trials_among_its_relatives() -> None:
    made = table(ChatTask__gemma=(0, 100))
    expected = pytest.approx(9 / (10 + MOST_OF_ONE_PAIR))
    assert rate(made, CHAT, ANY_OTHER).value == expected
    assert rate(made, DPO, "gemma").value == expected
    assert rate(made, DPO, ANY_OTHER).value == pytest.approx(HOUSE)  # no relative


def test_several_pairs_of_a_type_condemn_it_and_own_successes_acquit_a_pair() -> None:
    made = table(ChatTask__gemma=(0, 9), ChatTask__llama=(0, 9), ChatTask__qwen=(30, 30))
    assert rate(made, CHAT, ANY_OTHER).value == pytest.approx((9 + 3) / 19)
    assert rate(made, CHAT, "qwen").value == pytest.approx((10 * 9 / 16 + 30) / 40)


def test_a_family_without_evidence_is_judged_by_the_type_alone() -> None:
    tables = LearnedRates(delivery=table(ChatTask__gemma=(0, 9), ChatTask__llama=(0, 9)))
    assert tables.delivery_of(CHAT, "phi").value == pytest.approx(9 / 16)
    assert tables.delivery_of(CHAT, "gemma").value < 9 / 16


def test_counts_are_scaled_with_their_share_of_successes() -> None:
    assert Counts(50, 100).at_most(3) == Counts(1.5, 3)
    assert Counts(1, 2).at_most(3) == Counts(1, 2)


pair_counts = st.dictionaries(
    st.tuples(st.sampled_from([CHAT, DPO, "InstructTextTask"]), st.sampled_from(["llama", "gemma", "qwen"])),
    st.tuples(st.floats(0, 100), st.floats(0, 100)).map(
        lambda each: Counts(min(each), max(each)),
    ),
)


@given(counts=pair_counts, strength=st.floats(0.01, 1e4))
def test_every_rate_is_a_share_and_a_failure_never_raises_one(
    counts: dict[tuple[str, str], Counts], strength: float
) -> None:
    before = delivery_table(counts, HOUSE, strength)
    own = counts.get((CHAT, "llama"), Counts())
    after = delivery_table({**counts, (CHAT, "llama"): own + Counts(0, 1)}, HOUSE, strength)
    for key, found in before.learned.items():
        assert 0 <= found.value <= 1
        assert 0 <= found.spread <= 0.5
        assert after.learned[key].value <= found.value + 1e-9
