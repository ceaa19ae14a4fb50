"""The worker of test_rounds whose rank 0 waits for rank 1's trial: `waiting_side.py FOLDER`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from shared.clock import WallClock
from shared.messages.hardware import Hardware
from tests.engine.train.conftest import JOB
from trainer_node.engine.__main__ import leave
from trainer_node.engine.context import RunContext
from trainer_node.engine.distributed.launch import Ranks, rank_of
from trainer_node.engine.distributed.process_group import join
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.search.rounds import meet
from trainer_node.engine.search.trial import SearchRecord, Trial, TrialResult
from trainer_node.engine.signals import STOP_FILE, Stop

TRIALS = [Trial(arm="dense", rate=rate) for rate in (1.0, 3.0)]
LONG_S = 30.0  # of rank 1's trial, if nothing stops it


def main(folder: Path) -> int:
    """Start both ranks, or be one: rank 0's trial is done at once, rank 1's takes long."""
    rank = rank_of(os.environ)
    if rank is None:
        return Ranks([sys.executable, __file__, str(folder)], 2, folder / STOP_FILE).run()
    stop = Stop()
    stop.write_outcome = (folder / "outcome").touch
    stop.install(decides=rank == 0)
    group = join(Hardware(device="cpu", count=2, memory_bytes=2**34), 100.0)
    reporter = Reporter(folder / f"progress-{rank}.jsonl", "t", "a")
    run = RunContext(JOB, folder, WallClock(), reporter, stop, group)
    alone = run.alone()

    def train(trial: Trial, found: object) -> Any:
        until = time.monotonic() + LONG_S
        (folder / f"trains-{rank}").touch()
        while rank and time.monotonic() < until:
            if alone.stop.asked:
                (folder / "checkpoint").touch()
                return None
            time.sleep(0.01)
        result = TrialResult(trial=trial, loss=2.0, tokens=100, train_s=1.0)
        return SimpleNamespace(result=result, steps=1, plan=None, size=0)

    known = SearchRecord(began_at=0.0, all_s=100.0, plans={}, width=2).started(TRIALS[0], 0, TRIALS[1:])
    record = SimpleNamespace(costs=SimpleNamespace(save_s=0.0))
    runner = SimpleNamespace(run=alone, known=known, place=rank, record=record, train=train)
    meet(run, cast(Any, runner), TRIALS, cast(Any, SimpleNamespace(cost_s=lambda trial: 1.0)))
    return 0


if __name__ == "__main__":
    leave(main(Path(sys.argv[1])))
