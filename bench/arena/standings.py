"""Who ends where in the arena: entries task by task, places, margins, duels and tournaments."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from msgspec import Struct

from bench.arena.judge import Duel, duel, wilson
from bench.arena.task import Task
from bench.arena.tournament import tournament_rates

LOST = Duel(margin=-math.inf, rows_won=0.0, group=False, knockout=False, boss=False)
WON = Duel(margin=math.inf, rows_won=1.0, group=True, knockout=True, boss=True)


class Entry(Struct, frozen=True):
    """One profile's submission to a task; `losses` row by row, none if it was not valid."""

    task: Task
    profile: str
    loss: float | None
    losses: list[float]
    steps: int
    epochs: float
    error: str = ""
    base_loss: float | None = None  # the base model's on the same rows; not measured for instruct tasks


Standings = Mapping[Task, Mapping[str, Entry]]


def by_task(entries: Iterable[Entry]) -> Standings:
    """The entries by task and profile."""
    found: dict[Task, dict[str, Entry]] = defaultdict(dict)
    for entry in entries:
        found[entry.task][entry.profile] = entry
    return found


def print_table(found: Standings, profiles: Sequence[str]) -> None:
    """Print the losses task by task, the base model's first where it was measured; a star is the lowest."""
    print(f"\n{'':62}{'base':>8} " + " ".join(f"{name[:14]:>14}" for name in profiles))
    for task in sorted(found, key=str):
        losses = {name: found[task][name].loss for name in profiles}
        best = min((loss for loss in losses.values() if loss is not None), default=None)
        cells = ["-" if loss is None else f"{loss:.4f}{'*' * (loss == best)}" for loss in losses.values()]
        base = next((one.base_loss for one in found[task].values() if one.base_loss is not None), None)
        before = "" if base is None else f"{base:.4f}"
        print(f"{str(task)[:62]:62}{before:>8} " + " ".join(f"{cell:>14}" for cell in cells))


def duel_of(mine: Entry, other: Entry) -> Duel:
    """Judge two entries to one task; who has no valid submission loses."""
    if mine.loss is None:
        return LOST
    return WON if other.loss is None else duel(np.array(mine.losses), np.array(other.losses))


def summary(found: Standings, champion: str, rivals: Sequence[str], boss: str = "") -> dict[str, Any]:
    """How the champion did against its rivals, by upstream's rules."""
    places, margins, invalid = [], [], 0
    for entries in found.values():
        mine = entries[champion].loss
        others = [entries[rival].loss for rival in rivals]
        losses = [loss for loss in others if loss is not None]
        if mine is None:
            invalid += 1
            places.append(len(rivals) + 1)
            continue
        places.append(1 + sum(loss < mine for loss in losses))
        if losses:
            margins.append(min(losses) - mine)
    count, first = len(places), sum(place == 1 for place in places)
    duels = {
        (champion, rival): [duel_of(entries[champion], entries[rival]) for entries in found.values()]
        for rival in rivals
    }
    figures = {
        "tasks": count,
        "first_place_rate": round(first / max(1, count), 3),
        "first_place_interval": [round(bound, 3) for bound in wilson(first, count)],
        "top2_rate": round(sum(place <= 2 for place in places) / max(1, count), 3),
        "penalty_rate": round(invalid / max(1, count), 3),
        "margin_vs_best": round(median(margins), 4) if margins else None,
        "worst_margin": round(min(margins), 4) if margins else None,
    }
    if boss in rivals:
        figures |= _tournaments(found, champion, rivals, boss, duels)
    figures["against"] = {rival: _against(duels[champion, rival]) for rival in rivals if found}
    return figures


def _against(duels: Sequence[Duel]) -> dict[str, float]:
    finite = [one.margin for one in duels if math.isfinite(one.margin)]
    return {
        "group": round(float(np.mean([one.group for one in duels])), 3),
        "knockout": round(float(np.mean([one.knockout for one in duels])), 3),
        "boss": round(float(np.mean([one.boss for one in duels])), 3),
        "median_margin": round(median(finite), 4) if finite else 0.0,
    }


def _tournaments(
    found: Standings,
    champion: str,
    rivals: Sequence[str],
    boss: str,
    duels: dict[tuple[str, str], list[Duel]],
) -> dict[str, Any]:
    against_boss = _against(duels[champion, boss])
    losses = {
        name: [_or_last(entries[name].loss) for entries in found.values()] for name in (champion, *rivals)
    }
    defence = [duel_of(entries[boss], entries[champion]) for entries in found.values()]
    rates = tournament_rates(losses, {**duels, (boss, champion): defence}, champion, boss)
    return {
        "knockout_rate": against_boss["knockout"],
        "boss_rate": against_boss["boss"],
        "margin_vs_winner": against_boss["median_margin"],
        **rates,
    }


def _or_last(loss: float | None) -> float:
    return math.inf if loss is None else loss
