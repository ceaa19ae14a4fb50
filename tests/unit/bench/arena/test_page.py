"""The arena's page holds its figures, its losses and its plots."""

from pathlib import Path

from bench.arena.page import TITLES, write_page
from bench.arena.standings import Entry, by_task, summary
from bench.arena.task import Task

PROFILES = ("auto", "winner", "<b>")


def test_page_has_the_figures_and_needs_no_other_file(tmp_path: Path) -> None:
    tasks = [Task("wordnet", "llama", 100, budget, 0) for budget in (0.5, 2.0)]
    losses = {"auto": 1.25, "winner": 1.5, "<b>": None}
    entries = [
        Entry(task, name, loss, [] if loss is None else [loss] * 20, 10, 1.0)
        for task in tasks
        for name, loss in losses.items()
    ]
    found = by_task(entries)
    figures = summary(found, "auto", PROFILES[1:], "winner")
    write_page(tmp_path, found, PROFILES, figures)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<td>1.0</td>" in page  # the share of first places
    assert '<td class="best">1.2500</td>' in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("data:image/png;base64,") == len(TITLES)
    assert "http" not in page
    for name in TITLES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
