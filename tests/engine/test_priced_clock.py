"""Jobs on the arena's priced clock: they end in time by it, and a second run is the same."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from shared.messages.runs import decode_outcome

ROOT = Path(__file__).parents[2]
READY_BY = 700.0


def run(path: Path) -> dict[str, object]:
    """Run a job on the clock in a process of its own, as the arena does; what it ended with."""
    rows = json.loads((path.parent.parent / "rows.json").read_text())
    (path.parent / "test.json").write_text(json.dumps(rows[:20]))
    (path.parent / "prices").write_text("cpu")
    subprocess.run(
        [sys.executable, "-m", "bench.arena.contestant", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    metrics = decode_outcome((path.parent / "outcome.json").read_bytes()).metrics
    assert metrics is not None
    losses = json.loads((path.parent / "test_losses.json").read_text())
    return {"losses": losses, "steps": metrics.steps, "train_s": metrics.train_s, "tokens": metrics.tokens}


def test_a_priced_run_repeats_exactly_and_its_steps_take_what_they_cost(
    make_job: Callable[..., Path],
) -> None:
    changes = {"clock": "wall", "profile": "auto", "start_at": 0.0, "ready_by": READY_BY}
    first, second = run(make_job("first", **changes)), run(make_job("second", **changes))
    assert first == second
    steps, tokens, train_s = first["steps"], first["tokens"], first["train_s"]
    assert isinstance(steps, int)
    assert isinstance(tokens, int)
    assert isinstance(train_s, float)
    assert steps > 0
    assert (16.0 * steps + 0.97 * tokens) / 20.0 <= train_s < READY_BY
