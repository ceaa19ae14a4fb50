"""One process of test_rounds: a worker whose second trial fails."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer_node.engine import pipeline
from trainer_node.engine.__main__ import leave
from trainer_node.engine.context import RunContext
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import oom_fallback
from trainer_node.engine.train.state import TrainState


def main() -> int:
    """`failing_side.py JOB [always]`, as a rank: trial 2 fails, or all that rank 1 trains."""
    real = oom_fallback.descend

    def descend(run: RunContext, state: TrainState) -> None:
        if state.trial == 1 or (state.trial % 2 and sys.argv[2:]):
            raise RuntimeError("a bad kernel")
        real(run, state)

    oom_fallback.descend = descend
    return pipeline.main(Path(sys.argv[1]), Stop())


if __name__ == "__main__":
    leave(main())
