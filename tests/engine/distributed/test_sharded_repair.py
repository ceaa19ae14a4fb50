"""A model that is cut over two processes is repaired, or stays as it is, like one that is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.distributed.sharded_run import run_together

SIDE = Path(__file__).with_name("repair_side.py")


def test_a_sharded_model_is_repaired_and_set_back(tiny_model: Path, tmp_path: Path) -> None:
    run_together(2, [str(SIDE), str(tiny_model), str(tmp_path)])
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["given"] == pytest.approx(found["plain"], abs=1e-5)
        assert found["refused"] == pytest.approx(found["plain"], abs=1e-5)
        assert found["factor"] == 1.4
        assert found["repaired"] == pytest.approx(found["undone"], abs=1e-5)
        assert abs(found["undone"] - found["plain"]) > 0.01
