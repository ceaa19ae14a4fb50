"""Tournaments whose winner is known."""

import numpy as np
import pytest

from bench.arena.judge import Duel
from bench.arena.tournament import finalists, tournament_rates, wins_by_2026

TASKS = 12
WON = Duel(margin=0.1, rows_won=1.0, group=True, knockout=True, boss=True)
LOST = Duel(margin=-0.1, rows_won=0.0, group=False, knockout=False, boss=False)


def rates(champion: float, beats_boss: bool) -> dict[str, float]:
    losses = {"auto": [champion] * TASKS, "winner": [2.0] * TASKS, "a": [2.5] * TASKS, "b": [3.0] * TASKS}
    against = {name: [WON if champion < mean[0] else LOST] * TASKS for name, mean in losses.items()}
    duels = {("auto", name): found for name, found in against.items()}
    duels["auto", "winner"] = [WON if beats_boss else LOST] * TASKS
    duels["winner", "auto"] = [LOST if beats_boss else WON] * TASKS
    return tournament_rates(losses, duels, "auto", "winner")


def test_the_lowest_loss_everywhere_wins_and_defends() -> None:
    assert rates(1.0, True) == {
        "out_of_group_rate": 1.0,
        "boss_round_rate": 1.0,
        "tournament_rate": 1.0,
        "tournament_rate_2026": 1.0,
        "defended_rate": 1.0,
        "defended_rate_2026": 1.0,
    }


def test_a_task_that_is_lost_to_the_boss_costs_more_in_today_s_final() -> None:
    """Of nine tasks, all of them in each tournament, the boss is not beaten on one."""
    losses = {"auto": [1.0] * 9, "winner": [2.0] * 9}
    duels = {("auto", "winner"): [WON] * 8 + [LOST], ("winner", "auto"): [LOST] * 9}
    found = tournament_rates(losses, duels, "auto", "winner")
    assert found["tournament_rate"] == 1.0
    assert found["tournament_rate_2026"] == pytest.approx(4 / 9, abs=0.04)
    assert found["defended_rate_2026"] == 1.0


def test_a_challenger_that_trains_grpo_needs_one_task_less() -> None:
    losses = {"auto": [1.0] * 9, "winner": [2.0] * 9}
    duels = {("auto", "winner"): [LOST] * 9, ("winner", "auto"): [WON] * 8 + [LOST]}
    found = tournament_rates(losses, duels, "auto", "winner")
    # It is lost only if the task that the boss holds is the chat task.
    assert found["defended_rate_2026"] == pytest.approx(1 / 9, abs=0.04)
    assert found["defended_rate"] == 0.0


@pytest.mark.parametrize(
    ("lost", "grpo", "wins"),
    [
        ((), False, True),
        ((), True, True),
        ((0,), True, True),
        ((0,), False, False),
        ((0, 1), True, False),
        ((4,), True, False),  # the chat task
    ],
)
def test_today_s_final_may_cost_one_task_that_is_not_the_chat_task(
    lost: tuple[int, ...], grpo: bool, wins: bool
) -> None:
    assert wins_by_2026([task not in lost for task in range(5)], grpo=grpo) is wins


def test_who_does_not_beat_the_boss_does_not_win() -> None:
    found = rates(1.0, False)
    assert (found["boss_round_rate"], found["tournament_rate"], found["defended_rate"]) == (1.0, 0.0, 0.0)


def test_the_third_of_a_group_goes_home() -> None:
    assert rates(4.0, True)["out_of_group_rate"] == 0.0


def test_the_only_other_one_may_be_the_boss() -> None:
    losses = {"auto": [1.0] * TASKS, "winner": [2.0] * TASKS}
    duels = {("auto", "winner"): [WON] * TASKS, ("winner", "auto"): [LOST] * TASKS}
    found = tournament_rates(losses, duels, "auto", "winner")
    assert (found["boss_round_rate"], found["tournament_rate"]) == (1.0, 1.0)


def test_too_few_tasks_make_no_tournament() -> None:
    assert tournament_rates({"auto": [1.0], "winner": [2.0]}, {}, "auto", "winner") == {}


def test_finalists_are_ordered_by_tasks_won_then_by_loss() -> None:
    losses = np.array([[1.0, 1.0, 9.0], [2.0, 2.0, 1.0], [3.0, 1.5, 2.0]])
    assert finalists(losses) == [0, 1]
