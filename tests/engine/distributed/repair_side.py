"""One process of test_sharded_repair: `repair_side.py MODEL FOLDER`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from msgspec.structs import replace

from shared.messages.hardware import Hardware
from shared.planning.plan import Repair
from tests.engine import conftest
from tests.engine.distributed.sharded_run import run_context
from trainer_node.engine.__main__ import leave
from trainer_node.engine.assemble import load_base
from trainer_node.engine.context import JobData
from trainer_node.engine.damage import repair
from trainer_node.engine.damage.scaling import Scaling
from trainer_node.engine.distributed.process_group import destroy, join
from trainer_node.engine.distributed.sharding import shard_frozen
from trainer_node.engine.evaluate.metric import Evaluation, score
from trainer_node.engine.model.loading import load_model

# Of the root, which stays gathered after a pass, and of a layer, which doesn't.
NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
FACTOR = 1.4


def main() -> None:
    """Write a sharded model's losses as given, after a refused repair and after one, and the right ones."""
    torch.set_num_threads(1)
    group = join(Hardware(device="cpu", count=2, memory_bytes=2**34), 100.0)
    model, folder = sys.argv[1], Path(sys.argv[2])
    run = run_context(model, folder, group)
    run = dataclasses.replace(run, job=replace(run.job, profile="auto"))
    plan = replace(conftest._plan("dense", dtype="float32"), parallel="fsdp2", devices=2)
    rows = conftest._examples([9, 12, 30, 7])
    data = JobData(rows, rows, {}, 64)
    found = {"plain": score(load_model(model, "float32"), rows).loss}
    whole = load_model(model, "float32")
    repair.undo_scaling(whole, Repair(FACTOR, NAMES))
    found["undone"] = score(whole, rows).loss
    sharded = shard_frozen(load_base(run, plan), group)
    found["given"] = score(sharded, rows, process_group=group).loss
    for name, before in (("refused", 0.0), ("repaired", 100.0)):
        base = Evaluation(before, np.full(len(rows), before))
        with (
            patch.object(repair, "find_scaling", lambda matrices: Scaling(FACTOR, NAMES)),
            patch.object(repair, "candidates", lambda factor: [FACTOR / 2, FACTOR]),
        ):
            planned = repair.repaired(run, sharded, data, base, plan)
        assert (planned.repair is None) == (name == "refused")
        found[name] = score(sharded, rows, process_group=group).loss
        if planned.repair:
            found["factor"] = planned.repair.factor
    (folder / f"{group.rank}.json").write_text(json.dumps(found))
    destroy(group)


if __name__ == "__main__":
    main()
    leave(0)
