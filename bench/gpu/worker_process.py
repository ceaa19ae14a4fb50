"""A worker of the GPU suite: `python -m bench.gpu.worker_process RUN_FOLDER/job.json`.

The engine's own worker, on a torch that may be older than the engine asks for. With PODIUM_BENCH_PARALLEL its
plans are laid out so, because a planner shards no model that a test machine can train in a minute.
"""

from __future__ import annotations

import os
import sys

import torch
from msgspec.structs import replace

from bench.gpu import older_torch
from shared.planning.plan import Plan
from trainer_node.engine import pipeline, prepare
from trainer_node.engine.__main__ import leave, main
from trainer_node.engine.distributed import launch
from trainer_node.engine.distributed.process_group import ProcessGroup

MODULE = "bench.gpu.worker_process"
PARALLEL = "PODIUM_BENCH_PARALLEL"


def lay_out(parallel: str) -> None:
    """Have every plan carried out by `parallel`, on any number of processes."""

    def fitted(plan: Plan, process_group: ProcessGroup) -> Plan:
        return replace(plan, parallel=parallel, devices=process_group.world)

    for module in (pipeline, prepare):
        assert hasattr(module, "fitted"), f"{module.__name__} has another name for it"
        setattr(module, "fitted", fitted)  # noqa: B010
    if os.environ.get("WORLD_SIZE") == "1":
        torch.inference_mode = (
            torch.no_grad
        )  # as with several processes: sharded weights count their versions


if __name__ == "__main__":
    launch.command = lambda job_path: [sys.executable, "-m", MODULE, str(job_path)]  # ranks are the same
    older_torch.patch()
    if parallel := os.environ.get(PARALLEL):
        lay_out(parallel)
    leave(main())
