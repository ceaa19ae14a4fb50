"""Tournaments among the arena's profiles, drawn from tasks that they have all trained.

As upstream plays them: a group round of three tasks, where the lowest mean loss of each scores; the best two
play one task by the knockout rule; the winner meets the boss in a final. There are two finals here:

- five instruct tasks, four to win: `tournament_rate`
- that of upstream's code in autumn 2026, `tournament_rate_2026`: three instruct tasks, one of DPO, one of
  GRPO, and one that trains the last winner's chat model further. The challenger may lose one of the six, but
  not the chat task.

The tasks of `--suite cpu` are instruct tasks. They stand in for DPO and chat, which the boss's rule judges in
the same way, row by row. Podium does not train GRPO, so that task is the opponent's, whichever side the
champion is on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from bench.arena.judge import Duel

GROUP_TASKS, FINALISTS, BOSS_TASKS, BOSS_WINS = 3, 2, 5, 4
WINS_2026 = 5  # of six: the five that are drawn, of which the last is the chat task, and GRPO
DRAWS = 2000
RATES = (
    "out_of_group_rate",
    "boss_round_rate",
    "tournament_rate",
    "tournament_rate_2026",
    "defended_rate",
    "defended_rate_2026",
)

Duels = Mapping[tuple[str, str], Sequence[Duel]]  # (mine, other's) -> task by task


def tournament_rates(
    losses: Mapping[str, Sequence[float]], duels: Duels, champion: str, boss: str, seed: int = 0
) -> dict[str, float]:
    """How often the champion gets out of its group, gets to the boss, beats it, and holds its place as boss.

    `losses` has every profile's loss task by task, infinite for a submission that was not valid.
    `tournament_rate_2026` and `defended_rate_2026` are of the final of 2026.
    """
    random = np.random.default_rng(seed)
    table = np.array([losses[name] for name in losses])  # [profiles, tasks]
    names, count = list(losses), table.shape[1]
    entrants = [number for number, name in enumerate(names) if name != boss]
    if count < GROUP_TASKS + 1 + BOSS_TASKS or champion == boss or champion not in names:
        return {}
    counts = Counter[str]()
    for _ in range(DRAWS):
        tasks = random.choice(count, GROUP_TASKS + 1 + BOSS_TASKS, replace=False)
        group, knockout, final = tasks[:GROUP_TASKS], tasks[GROUP_TASKS], tasks[GROUP_TASKS + 1 :]
        pair = finalists(table[entrants][:, group])
        here = [names[entrants[number]] for number in pair]
        against = [duels[boss, champion][int(task)].boss for task in final]
        counts["defended_rate"] += sum(against) < BOSS_WINS
        counts["defended_rate_2026"] += not wins_by_2026(against, grpo=True)
        if champion not in here:
            continue
        counts["out_of_group_rate"] += 1
        others = [name for name in here if name != champion]  # none if there is only the boss to play
        if not all(duels[champion, other][int(knockout)].knockout for other in others):
            continue
        counts["boss_round_rate"] += 1
        mine = [duels[champion, boss][int(task)].boss for task in final]
        counts["tournament_rate"] += sum(mine) >= BOSS_WINS
        counts["tournament_rate_2026"] += wins_by_2026(mine, grpo=False)
    return {name: round(counts[name] / DRAWS, 3) for name in RATES}


def wins_by_2026(drawn: Sequence[bool], *, grpo: bool) -> bool:
    """Return whether who won these five tasks, and GRPO or not, is the new boss by the rules of 2026."""
    return drawn[-1] and sum(drawn) + grpo >= WINS_2026


def finalists(losses: np.ndarray) -> list[int]:
    """The best two of float64[entrants, tasks]: by tasks won, then by mean loss."""
    wins = np.bincount(losses.argmin(axis=0), minlength=len(losses))
    order = sorted(range(len(losses)), key=lambda number: (-wins[number], losses[number].mean()))
    return order[:FINALISTS]
