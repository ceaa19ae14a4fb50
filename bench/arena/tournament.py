"""Tournaments among the arena's profiles, drawn from tasks that they have all trained.

As upstream plays them: a group round of three tasks, where the lowest mean loss of each scores; the best two
play one task by the knockout rule; the winner meets the boss on five tasks and needs four of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bench.arena.judge import Duel

GROUP_TASKS, FINALISTS, BOSS_TASKS, BOSS_WINS = 3, 2, 5, 4
DRAWS = 2000

Duels = Mapping[tuple[str, str], Sequence[Duel]]  # (mine, other's) -> task by task


def tournament_rates(
    losses: Mapping[str, Sequence[float]], duels: Duels, champion: str, boss: str, seed: int = 0
) -> dict[str, float]:
    """How often the champion gets out of its group, gets to the boss, beats it, and holds its place as boss.

    `losses` has every profile's loss task by task, infinite for a submission that was not valid.
    """
    random = np.random.default_rng(seed)
    table = np.array([losses[name] for name in losses])  # [profiles, tasks]
    names, count = list(losses), table.shape[1]
    entrants = [number for number, name in enumerate(names) if name != boss]
    if count < GROUP_TASKS + 1 + BOSS_TASKS or champion == boss or champion not in names:
        return {}
    advanced = reached = won = held = 0
    for _ in range(DRAWS):
        tasks = random.choice(count, GROUP_TASKS + 1 + BOSS_TASKS, replace=False)
        group, knockout, final = tasks[:GROUP_TASKS], tasks[GROUP_TASKS], tasks[GROUP_TASKS + 1 :]
        pair = finalists(table[entrants][:, group])
        here = [names[entrants[number]] for number in pair]
        boss_tasks = [int(task) for task in final]
        held += sum(duels[boss, champion][task].boss for task in boss_tasks) < BOSS_WINS
        if champion not in here:
            continue
        advanced += 1
        others = [name for name in here if name != champion]  # none if there is only the boss to play
        if not all(duels[champion, other][int(knockout)].knockout for other in others):
            continue
        reached += 1
        won += sum(duels[champion, boss][task].boss for task in boss_tasks) >= BOSS_WINS
    return {
        "out_of_group_rate": round(advanced / DRAWS, 3),
        "boss_round_rate": round(reached / DRAWS, 3),
        "tournament_rate": round(won / DRAWS, 3),
        "defended_rate": round(held / DRAWS, 3),
    }


def finalists(losses: np.ndarray) -> list[int]:
    """The best two of float64[entrants, tasks]: by tasks won, then by mean loss."""
    wins = np.bincount(losses.argmin(axis=0), minlength=len(losses))
    order = sorted(range(len(losses)), key=lambda number: (-wins[number], losses[number].mean()))
    return order[:FINALISTS]
