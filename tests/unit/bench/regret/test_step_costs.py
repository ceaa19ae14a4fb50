"""Prices of steps as they are measured."""

from bench.arena.prices.prices import Method, Prices, StepPrice
from bench.regret.step_costs import Line, line_of, prices_of


def test_prices_are_in_tokens_of_a_dense_step() -> None:
    tokens = [10.0, 20.0, 40.0]
    lines: dict[Method, Line] = {
        "everything": line_of(tokens, [0.5 + 0.02 * one for one in tokens]),
        "dense": line_of(tokens, [0.2 + 0.01 * one for one in tokens]),
        "lora": Line(0.1, 0.008),
    }
    found = prices_of(lines, 0.003)
    assert found == Prices(StepPrice(50.0, 2.0), StepPrice(20.0, 1.0), StepPrice(10.0, 0.8), 0.3)


def test_a_line_is_never_below_zero() -> None:
    assert line_of([1.0, 2.0], [0.5, 2.0]).step_s == 0.0
