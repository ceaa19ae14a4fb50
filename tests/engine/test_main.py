"""What a worker's process sets before it imports anything large."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Ends where the worker would begin to import torch. Its output is a pipe, so it goes to worker.log.
PROGRAM = """
import os, sys
from trainer_node.engine import __main__ as worker
from trainer_node.engine.distributed import launch
def rank_of(environment):
    print(environment["THP_MEM_ALLOC_ENABLE"], flush=True)
    os._exit(0)
launch.rank_of = rank_of
worker.main()
"""


@pytest.mark.parametrize(("given", "wanted"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_large_tensors_get_huge_pages_unless_the_operator_says_no(
    given: dict[str, str], wanted: str, tmp_path: Path
) -> None:
    job = tmp_path / "job.json"
    job.write_text("{}")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("THP_")}
    command = [sys.executable, "-c", PROGRAM, str(job)]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env=inherited | given)
    assert (tmp_path / "worker.log").read_text().split() == [wanted]
