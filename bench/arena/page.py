"""The arena's page: one HTML file that needs nothing else, and its plots as PNG."""

from __future__ import annotations

import base64
import html
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.arena.standings import Standings, duel_of

TITLES = {
    "gap_by_budget": "Loss above the task's lowest, by training budget (median over tasks)",
    "margins": "The champion's margin over its best rival, task by task",
    "wins": "Share of tasks on which the row's profile has a lower mean loss than the column's",
}


def write_page(folder: Path, found: Standings, profiles: Sequence[str], figures: Mapping[str, Any]) -> None:
    """Write index.html and one PNG for each plot."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {
        "gap_by_budget": gap_by_budget(found, profiles),
        "margins": margins(found, profiles),
        "wins": wins(found, profiles),
    }
    parts = []
    for name, plot in plots.items():
        image = png(plot)
        (folder / f"{name}.png").write_bytes(image)
        source = base64.b64encode(image).decode()
        title = html.escape(TITLES[name])
        parts.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{source}">')
    page = _PAGE.format(figures=_rows_of(figures), losses=_losses(found, profiles), plots="\n".join(parts))
    (folder / "index.html").write_text(page, encoding="utf-8")


def png(plot: Figure) -> bytes:
    """A plot as a PNG file's bytes."""
    file = io.BytesIO()
    plot.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return file.getvalue()


def gap_by_budget(found: Standings, profiles: Sequence[str]) -> Figure:
    """Plot every profile's loss above the lowest one of each task against the budget in epochs."""
    gaps: dict[str, dict[float, list[float]]] = {name: defaultdict(list) for name in profiles}
    for task, entries in found.items():
        losses = {name: entries[name].loss for name in profiles}
        lowest = min((loss for loss in losses.values() if loss is not None), default=0.0)
        for name, loss in losses.items():
            if loss is not None:
                gaps[name][task.epochs].append(loss - lowest)
    plot, axes = _figure(7, 4)
    for name in profiles:
        budgets = sorted(gaps[name])
        axes.plot(budgets, [np.median(gaps[name][one]) for one in budgets], marker="o", label=name)
    axes.set(xlabel="budget, epochs", ylabel="nat above the lowest", xscale="log")
    axes.legend(fontsize=8)
    return plot


def margins(found: Standings, profiles: Sequence[str]) -> Figure:
    """Plot the champion's margin over the best other profile, in order; right of zero it is first."""
    champion, *rivals = profiles
    values = {}
    for task, entries in found.items():
        mine = entries[champion].loss
        losses = [loss for rival in rivals if (loss := entries[rival].loss) is not None]
        if mine is not None and losses:
            values[str(task)] = min(losses) - mine
    order = sorted(values, key=lambda name: values[name])
    plot, axes = _figure(8, 1 + 0.17 * len(order))
    colours = ["tab:blue" if values[name] > 0 else "tab:red" for name in order]
    axes.barh(order, [values[name] for name in order], color=colours)
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xlabel="nat")
    axes.axvline(0.0, color="black", linewidth=0.8)
    return plot


def wins(found: Standings, profiles: Sequence[str]) -> Figure:
    """Plot who beats whom by the group rule."""
    shares = np.array([[_share(found, mine, other) for other in profiles] for mine in profiles])
    plot, axes = _figure(6, 5)
    axes.imshow(shares, cmap="RdBu", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(profiles)), profiles, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(profiles)), profiles, fontsize=8)
    for (row, column), share in np.ndenumerate(shares):
        if row != column:
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=8)
    return plot


def _share(found: Standings, mine: str, other: str) -> float:
    if mine == other:
        return 0.5
    return float(np.mean([duel_of(entries[mine], entries[other]).margin > 0 for entries in found.values()]))


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    plot = Figure(figsize=(width, height))
    return plot, plot.subplots()


def _rows_of(figures: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in figures.items() if name != "against"}
    cells = [f"<tr><th>{html.escape(name)}</th><td>{value}</td></tr>" for name, value in plain.items()]
    return "\n".join(cells)


def _losses(found: Standings, profiles: Sequence[str]) -> str:
    rows = ["<tr><th>task</th>" + "".join(f"<th>{html.escape(name)}</th>" for name in profiles) + "</tr>"]
    for task in sorted(found, key=str):
        losses = [found[task][name].loss for name in profiles]
        best = min((loss for loss in losses if loss is not None), default=None)
        cells = "".join(_cell(loss, loss == best) for loss in losses)
        rows.append(f"<tr><th>{html.escape(str(task))}</th>{cells}</tr>")
    return "\n".join(rows)


def _cell(loss: float | None, best: bool) -> str:
    return "<td>-</td>" if loss is None else f'<td class="{"best" if best else "other"}">{loss:.4f}</td>'


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Podium: accuracy arena</title>
<style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 70em; color: #222; }}
table {{ border-collapse: collapse; font-size: .85em; }}
th, td {{ padding: .15em .6em; border-bottom: 1px solid #ddd; text-align: right; }}
th {{ text-align: left; font-weight: normal; }}
.best {{ font-weight: bold; }}
img {{ max-width: 100%; }}
</style></head><body>
<h1>Accuracy arena</h1>
<p>Profiles train the same tasks in the same time.
It is counted in trained tokens, or by the prices that a task names.
Rows that nobody trained or chose on judge them, by upstream's rules.</p>
<table>{figures}</table>
{plots}
<h2>Losses</h2>
<table>{losses}</table>
</body></html>
"""
