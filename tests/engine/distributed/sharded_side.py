"""One process of test_sharded_search: a worker that shards its model, as if no device could hold it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from shared.planning.plan import Plan
from shared.planning.profiles import PROFILES
from trainer_node.engine import pipeline, prepare
from trainer_node.engine.__main__ import leave
from trainer_node.engine.context import RunContext
from trainer_node.engine.distributed.launch import rank_of
from trainer_node.engine.search import choose, scoring, search, speed
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import async_saver, oom_fallback
from trainer_node.engine.train.disk_plan import CheckpointContent, DiskChoice
from trainer_node.engine.train.state import TrainState


def main() -> int:
    """`sharded_side.py JOB [fails | fails-last | weights | nothing | memory | lora | factor]`, as a rank.

    All arms are LoRA, or the second trial fails (in all ranks, or in the last one), or the disk has room for
    no more of a checkpoint, or memory runs out in the last rank while steps are timed. With `factor` there is
    one trial, of LoRA, which is best at three quarters of its way.
    """
    real = prepare.draw_plan

    def draw_plan(*arguments: Any, **options: Any) -> Plan:
        plan = real(*arguments, **options)
        extras = replace(plan.extras, embeddings=False)  # FSDP2 would gather them
        return replace(plan, parallel="fsdp2", activation_checkpointing=True, extras=extras)

    def out_of_memory(*_: Any) -> bool:
        raise torch.OutOfMemoryError("out of memory")

    train = oom_fallback.descend

    def descend(run: RunContext, state: TrainState) -> None:
        if state.trial == 1:
            raise RuntimeError("a bad kernel")
        train(run, state)

    prepare.draw_plan = draw_plan
    if sys.argv[2:] == ["fails"] or (sys.argv[2:] == ["fails-last"] and rank_of(os.environ) == 1):
        oom_fallback.descend = descend
    if sys.argv[2:] == ["memory"] and rank_of(os.environ) == 1:
        speed.timed_step = out_of_memory  # type: ignore[attr-defined, assignment]
    if sys.argv[2:] == ["factor"]:
        choose_next = search._next
        search._next = lambda *known: None if known[2].done else choose_next(*known)
        scoring.best_factor = lambda *_: 0.75  # type: ignore[attr-defined]
        choose.better_on_both_halves = lambda *_: True
    if sys.argv[2:] in (["lora"], ["factor"]):
        PROFILES["auto"] = replace(PROFILES["auto"], full=False, rank=16, arms=("lora_r16",))
    contents = {"weights": CheckpointContent.WEIGHTS, "nothing": CheckpointContent.NOTHING}
    if (content := contents.get(sys.argv[-1])) is not None:
        async_saver.choose = lambda *_: DiskChoice(content)  # type: ignore[attr-defined]
    return pipeline.main(Path(sys.argv[1]), Stop())


if __name__ == "__main__":
    leave(main())
