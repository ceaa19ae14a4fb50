from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from bench.fake_validator import requests
from bench.fake_validator.simulator import read_trace, write_trace
from bench.fake_validator.trace import JULY, OCTOBER, Event, World, generate, tasks_per_day

# upstream's own loop, run for 60 days: date, rows, evaluation -> tasks a day, mean hours, mean hours of text
MONTE_CARLO = [
    (JULY, "equal", 0.5, 46.5, 5.7, 7.0),
    (JULY, "equal", 1.5, 40.0, 5.7, 7.0),
    (JULY, "log", 0.5, 60.5, 4.2, 5.1),
    (JULY, "log", 1.5, 49.6, 4.2, 5.1),
    (OCTOBER, "equal", 0.5, 54.8, 3.8, 4.4),
    (OCTOBER, "equal", 1.5, 44.8, 3.8, 4.4),
    (OCTOBER, "log", 0.5, 66.7, 3.1, 3.4),
    (OCTOBER, "log", 1.5, 52.0, 3.1, 3.4),
]
TEXT_HOURS = {1: 0.12, 2: 0.12, 3: 0.15, 4: 0.06, 5: 0.08, 6: 0.09, 7: 0.11, 8: 0.11, 9: 0.10, 10: 0.07}


@pytest.fixture(scope="module")
def quarter() -> list[Event]:
    return generate(World(), hours=90 * 24, seed=3)


@pytest.mark.parametrize(("constants", "rows", "waits", "per_day", "mean", "mean_text"), MONTE_CARLO)
def test_the_schedulers_loop_makes_upstreams_rate_and_hours(
    constants: Any, rows: str, waits: float, per_day: float, mean: float, mean_text: float
) -> None:
    world = World(constants=constants, rows=rows, evaluation_h=waits)
    seen = tasks_per_day(world, days=60, seed=5)
    assert seen == (
        pytest.approx(per_day, rel=0.05),
        pytest.approx(mean, rel=0.05),
        pytest.approx(mean_text, rel=0.05),
    )


def test_hours_of_text_tasks_follow_the_rows(quarter: list[Event]) -> None:
    hours = [event.offer["hours_to_complete"] for event in quarter if event.rows is not None]
    counts = Counter(hours)
    for hour, share in TEXT_HOURS.items():
        assert counts[hour] / len(hours) == pytest.approx(share, abs=0.02)


def test_kinds_models_and_sizes(quarter: list[Event]) -> None:
    synthetic = [event for event in quarter if not event.organic and event.fault is None]
    text = [event for event in quarter if event.kind != requests.IMAGE]
    shares = Counter(event.kind for event in synthetic)
    # images are asked of all 60 nodes, text tasks only until 8 to 15 of 30% have accepted
    asked = {kind: share * (1.0 if kind == requests.IMAGE else 0.64) for kind, share in JULY.mix.items()}
    for kind, share in asked.items():
        assert shares[kind] / len(synthetic) == pytest.approx(share / sum(asked.values()), abs=0.04)
    unknown = sum(event.offer["model_params_count"] is None for event in text) / len(text)
    assert unknown == pytest.approx(0.02, abs=0.01)
    big = sum((event.offer["model_params_count"] or 0) > 12e9 for event in text) / len(text)
    assert big == pytest.approx(0.02, abs=0.01)
    assert {event.offer["ds_size"] for event in text} == {100_000}
    pairs = [event.offer["ds_size"] for event in quarter if event.kind == requests.IMAGE]
    assert (min(pairs), max(pairs)) == (10, 50)


def test_starts_repeats_bursts_and_faults(quarter: list[Event]) -> None:
    first = [event for event in quarter if event.attempt == 1 and event.fault is None]
    gaps = [event.start_after_s for event in first if event.start_after_s is not None]
    assert 1 - len(gaps) / len(first) == pytest.approx(0.02, abs=0.01)
    assert sum(gaps) / len(gaps) == pytest.approx(60, rel=0.1)
    assert max(gaps) <= 900
    by_task: dict[str, list[Event]] = {}
    for event in quarter:
        by_task.setdefault(event.offer["task_id"], []).append(event)
    again = [events for events in by_task.values() if len(events) > 1]
    assert again
    for events in again:
        assert all(event.organic for event in events)
        assert len(events) <= 7
        assert [event.attempt for event in events] == list(range(1, len(events) + 1))
        assert all(b.at - a.at >= 900 for a, b in pairwise(events))
    times = [event.at for event in first]
    bursts = sum(times[place + 4] - times[place] < 1 for place in range(len(times) - 4))
    assert bursts / 90 == pytest.approx(2.0, rel=0.3)
    faults = Counter(event.fault for event in quarter if event.fault)
    for fault in ("bad signature", "stale nonce"):
        assert faults[fault] / len(first) == pytest.approx(0.01, abs=0.005)
    organic = sum(event.organic for event in first) / 90
    assert organic == pytest.approx(9 * 0.73, rel=0.15)  # customers' tasks, thinned like all others


def test_the_same_seed_gives_the_same_trace(tmp_path: Path, quarter: list[Event]) -> None:
    assert generate(World(), hours=90 * 24, seed=3) == quarter
    assert generate(World(), hours=24, seed=4) != generate(World(), hours=24, seed=5)
    assert [event.at for event in quarter] == sorted(event.at for event in quarter)
    write_trace(tmp_path / "trace.jsonl", quarter[:50])
    assert read_trace(tmp_path / "trace.jsonl") == quarter[:50]


def test_a_world_without_faults_has_none() -> None:
    events = generate(replace(World(), faulty=False), hours=240, seed=0)
    assert {(event.attempt, event.fault) for event in events} == {(1, None)}
