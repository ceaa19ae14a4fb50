from __future__ import annotations

import pytest

from podium.sparkline import LEVELS, means, sparkline


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([2.0], LEVELS[0]),
        ([1.0, 1.0], LEVELS[0] * 2),
        ([float(number) for number in range(8)], LEVELS),
        ([8.0, 1.0], LEVELS[7] + LEVELS[0]),
    ],
)
def test_the_lowest_value_is_the_lowest_block(values: list[float], drawn: str) -> None:
    assert sparkline(values) == drawn


@pytest.mark.parametrize("count", [25, 100, 10_001])
def test_a_long_curve_keeps_its_form_and_a_bounded_width(count: int) -> None:
    drawn = sparkline([3.0 - 2.0 * number / count for number in range(count)], 24)
    assert len(drawn) == 24
    assert (drawn[0], drawn[-1]) == (LEVELS[7], LEVELS[0])
    assert sorted(drawn, reverse=True) == list(drawn)


def test_every_value_counts_once() -> None:
    assert means([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
