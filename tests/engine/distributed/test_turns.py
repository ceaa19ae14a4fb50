"""Several processes load one model: rank 0 first, then the others, as memory allows."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np

from tests.engine.distributed.sharded_run import run_together
from trainer_node.engine.distributed.turns import weighed

SIDE = Path(__file__).with_name("turns_side.py")


def test_the_others_load_together_what_fits_and_else_in_turn(tmp_path: Path) -> None:
    """Three processes: with two there is only one that could wait for its turn."""
    run_together(3, [str(SIDE), str(tmp_path)])
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {"small": True, "large": False}


def test_what_is_loaded_weighs_its_own_memory_and_not_that_of_files(tmp_path: Path) -> None:
    size = 2**26
    loaded, weight = weighed(lambda: fresh(size))
    assert loaded.nbytes == size
    assert 0.95 * size < weight < 1.2 * size
    loaded.tofile(tmp_path / "weights")
    mapped, weight = weighed(lambda: read(tmp_path / "weights"))
    assert len(mapped) == size
    assert weight < 0.1 * size


def fresh(size: int) -> np.ndarray:
    """Bytes in pages of their own: an array can lie in pages that this process kept from an earlier test."""
    array = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    array[:] = 1
    return array


def read(path: Path) -> np.memmap:
    """A mapped file, all of it in memory."""
    file = np.memmap(path, np.uint8, "r")
    assert int(file[::4096].sum()) == len(file) / 4096
    return file
