"""Several processes load one model: rank 0 first, then the others, as memory allows."""

from __future__ import annotations

import json
from pathlib import Path

from tests.engine.distributed.sharded_run import run_together

SIDE = Path(__file__).with_name("turns_side.py")


def test_the_others_load_together_what_fits_and_else_in_turn(tmp_path: Path) -> None:
    """Three processes: with two there is only one that could wait for its turn."""
    run_together(3, [str(SIDE), str(tmp_path)])
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"small": True, "large": False}
