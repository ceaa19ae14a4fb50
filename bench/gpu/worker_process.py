"""A worker of the GPU suite: `python -m bench.gpu.worker_process RUN_FOLDER/job.json`.

The engine's own worker, on a torch that may be older than the engine asks for. With PODIUM_BENCH_PARALLEL its
plans are laid out so, because a planner shards no model that a test machine can train in a minute.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trainer_node.engine.__main__ import leave, main
from trainer_node.engine.distributed import launch

MODULE = "bench.gpu.worker_process"
PARALLEL = "PODIUM_BENCH_PARALLEL"


def prepare_to_train(parallel: str) -> None:
    """In a process that trains: mend an older torch, and have every plan carried out by `parallel`."""
    import torch
    from msgspec.structs import replace

    from bench.gpu import older_torch
    from shared.planning.plan import Plan
    from trainer_node.engine import pipeline, prepare
    from trainer_node.engine.distributed.process_group import ProcessGroup

    older_torch.patch()
    if not parallel:
        return

    def fitted(plan: Plan, process_group: ProcessGroup) -> Plan:
        return replace(plan, parallel=parallel, devices=process_group.world)

    for module in (pipeline, prepare):
        assert hasattr(module, "fitted"), f"{module.__name__} has another name for it"
        setattr(module, "fitted", fitted)  # noqa: B010
    if os.environ.get("WORLD_SIZE") == "1":  # sharded weights count their versions, as with several processes
        torch.inference_mode = torch.no_grad


if __name__ == "__main__":
    launch.command = lambda job_path: [sys.executable, "-m", MODULE, str(job_path)]  # ranks are the same
    if launch.rank_of(os.environ) is not None or launch.world_of(Path(sys.argv[1])) == 1:
        prepare_to_train(os.environ.get(PARALLEL, ""))
    leave(main())
