"""One process of test_sharded_export: submissions of sharded weights, and writes that fail in one process."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from shared.messages.hardware import Hardware
from shared.messages.runs import Metrics
from shared.planning.model_shape import ModulePlan
from shared.planning.plan import Plan, Repair
from shared.planning.throughput import Costs
from tests.engine import conftest
from tests.engine.distributed.sharded_run import run_context
from trainer_node.engine import submission
from trainer_node.engine.__main__ import leave
from trainer_node.engine.assemble import adapt, load_base
from trainer_node.engine.context import RunContext, RunRecord
from trainer_node.engine.damage.repair import undo_scaling
from trainer_node.engine.distributed.process_group import ProcessGroup, destroy, join
from trainer_node.engine.distributed.sharding import gathered, local
from trainer_node.engine.distributed.weight_slices import rows_of, slices_of
from trainer_node.engine.evaluate.candidates import Candidate, TrainProgress
from trainer_node.engine.export import sharded_writer, writer
from trainer_node.engine.export.reload_time import reload_s
from trainer_node.engine.model.adapters import Deltas, add_deltas
from trainer_node.engine.model.linears import trainable_linears
from trainer_node.engine.model.loading import load_model

METRICS = Metrics(base_loss=1.0, dev_examples=1, train_examples=1, steps=1, tokens=1)


def main() -> None:
    """`export_side.py MODEL FOLDER CASE...`, as a rank: what it says of each case goes into RANK.json."""
    torch.set_num_threads(1)
    group = join(Hardware(device="cpu", count=2, memory_bytes=2**34), 100.0)
    folder, said = Path(sys.argv[2]), {}
    run = run_context(sys.argv[1], folder, group)
    for case in sys.argv[3:]:
        kind, *words = case.split("-")
        said[case] = CASES[kind](run, folder / case, *words)
    (folder / f"{group.rank}.json").write_text(json.dumps(said))
    destroy(group)


# --- what all processes write is what one writes that has all weights


def alike(run: RunContext, folder: Path, method: str, dtype: str) -> str:
    """Both kinds of submission of a plan with one method."""
    plan = plan_for(run, method, dtype)
    exports_alike(trained(run, plan), plan, run, folder)
    return ""


def kept(run: RunContext, folder: Path, method: str, dtype: str) -> str:
    """Both kinds of a model whose own code keeps some norms in fp32; returns what those are written in."""
    with patch.object(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"]):
        alike(run, folder, method, dtype)
    found = load_file(folder / "model" / "model.safetensors")
    return str(found["model.layers.0.input_layernorm.weight"].dtype)


def repaired(run: RunContext, folder: Path, method: str, module: str) -> str:
    """The submission of a model of which one kind of module was scaled, and is repaired; returns its kind."""
    names = [name for name, _ in load_model(run.job.model_path, "bfloat16").named_parameters()]
    weights = [name for name in names if f"{module}." in name]
    assert weights
    plan = plan_for(run, method, "bfloat16", repair=Repair(1.25, weights))
    deltas, group = trained(run, plan), run.process_group
    metrics = sharded_writer.write(deltas, plan, run.job, METRICS, folder, group)
    if (alone := on_one(deltas, plan, run)) is not None:
        single = folder.with_name(f"{folder.name}-alone")
        assert writer.write(alone, plan, run.job, METRICS, single).kind == metrics.kind
        compare(folder, single, merged=merged_in(deltas))
    return metrics.kind


def loads(run: RunContext, folder: Path, method: str) -> str:
    """Return how often rank 0 loads the model again to export it."""
    plan = plan_for(run, method, "float32")
    deltas = trained(run, plan)
    base = writer.base_of(deltas)
    record = RunRecord(
        fingerprint="", base_losses=[1.0], train_examples=1, train_tokens=1, dropped={}, costs=Costs()
    )
    state: Any = SimpleNamespace(deltas=deltas, plan=plan)
    found = Mock(wraps=load_model)
    with patch.object(submission, "load_model", found), patch.object(writer, "load_model", found):
        submission._export(
            replace(run, folder=folder), record, state, Candidate("last", TrainProgress(1, 1, 1.0))
        )
    assert reload_s(plan, base, 2.0) == 2.0 * run.process_group.broadcast_object(found.call_count)
    assert (folder / "export" / "README.md").exists() or not run.process_group.is_main
    return str(found.call_count)


def exports_alike(deltas: Deltas, plan: Plan, run: RunContext, folder: Path) -> None:
    """Write the submission that fits the plan, and the whole model. `folder` is the same for all."""
    group = run.process_group
    assert sharded_writer.keeps_names(writer.base_of(deltas))
    sharded_writer.write(deltas, plan, run.job, METRICS, folder / "chosen", group)

    def fill(temporary: Path) -> None:
        sharded_writer.write_model(deltas, run.job, temporary, group)

    sharded_writer.write_folder(fill, plan, run.job, METRICS, folder / "model", group)
    if (alone := on_one(deltas, plan, run)) is None:
        return
    writer.write(alone, plan, run.job, METRICS, folder / "alone" / "chosen")
    (folder / "alone" / "model").mkdir()
    writer.write_model(writer.base_of(alone), run.job, folder / "alone" / "model")
    for kind in ("chosen", "model"):
        compare(folder / kind, folder / "alone" / kind, merged=merged_in(deltas))


def merged_in(deltas: Deltas) -> set[str]:
    """Return the weights that LoRA's factors are added to in a whole model."""
    return {f"{name.partition('.lora_')[0]}.weight" for name in deltas.parameters if ".lora_" in name}


def compare(found: Path, wanted: Path, *, merged: set[str]) -> None:
    """Files that several processes wrote with those of one: equal, but where LoRA's factors were added.

    Products of fewer rows may round otherwise: by one step of bf16.
    """
    names = {path.name for path in wanted.iterdir()} | {"README.md"}
    assert names == {path.name for path in found.iterdir()}, names
    for name in names - {"README.md", "model.safetensors"}:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    if "model.safetensors" not in names:
        return
    tensors, expected = (load_file(place / "model.safetensors") for place in (found, wanted))
    assert tensors.keys() == expected.keys(), tensors.keys() ^ expected.keys()
    for name, value in tensors.items():
        rtol = 2**-7 if name in merged else 0
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=0, msg=name)


def plan_for(run: RunContext, method: str, dtype: str, **changes: Any) -> Plan:
    """Return a sharded plan for all linear modules of the job's model."""
    modules = []
    for index, linear in enumerate(trainable_linears(load_model(run.job.model_path, dtype))):
        lora = method == "lora" or (method == "mixed" and index % 2 == 0)
        modules.append(
            ModulePlan(
                name=linear.name,
                in_features=linear.in_features,
                out_features=linear.out_features,
                count=linear.count,
                method="lora" if lora else "dense",
                rank=4 if lora else 0,
                alpha=8.0 if lora else 0.0,
            )
        )
    return conftest._plan(dtype=dtype, modules=modules, parallel="fsdp2", devices=2, **changes)


def trained(run: RunContext, plan: Plan) -> Deltas:
    """Return sharded deltas that are not as they were before the first step."""
    deltas, group = adapt(run, plan, load_base(run, plan)).deltas, run.process_group
    random = torch.Generator().manual_seed(1)
    for weight in deltas.parameters.values():
        change = 0.02 * torch.randn(weight.shape, generator=random)
        local(weight.detach()).add_(change[slice(*rows_of(len(weight), group.rank, group.world))])
    return deltas


def on_one(deltas: Deltas, plan: Plan, run: RunContext) -> Deltas | None:
    """Collective: rank 0's copy of the deltas with all weights; None for the others."""
    weights = gathered(deltas.state(), run.process_group)
    if not run.process_group.is_main:
        return None
    model = load_model(run.job.model_path, plan.dtype)
    undo_scaling(model, plan.repair)
    alone = add_deltas(model, plan, run.job.seed)
    alone.load_state(weights)
    return alone


# --- one process can't


def failing(run: RunContext, folder: Path, what: str) -> str:
    """Return the error that is raised; all are in step afterwards, and the next write succeeds."""
    group = run.process_group
    plan = plan_for(run, "mixed", "float32")
    deltas = trained(run, plan)
    try:
        with FAULTS[what](deltas, group):
            sharded_writer.write(deltas, plan, run.job, METRICS, folder, group)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    assert group.gather_objects(group.rank) == list(range(group.world))
    assert not folder.exists()
    group.gather_objects(None)
    sharded_writer.write(deltas, plan, run.job, METRICS, folder, group)
    assert group.gather_objects(folder.exists()) == [True] * group.world
    return said


def full(*_: object, **__: object) -> Any:
    """Whatever it was to write."""
    raise OSError(errno.ENOSPC, "No space left on device")


def no_config(deltas: Deltas, group: ProcessGroup) -> AbstractContextManager[object]:
    """Rank 0 can't write the adapter's configuration."""
    return patch.object(writer, "adapter_config", full) if group.is_main else nullcontext()


def no_room(deltas: Deltas, group: ProcessGroup) -> AbstractContextManager[object]:
    """Rank 1 can't write its rows."""
    return nullcontext() if group.is_main else patch.object(os, "pwrite", full)


def no_rows(error: Exception) -> Callable[[Deltas, ProcessGroup], AbstractContextManager[object]]:
    """Rank 1 can't read the base model's rows of a dense weight."""

    def fault(deltas: Deltas, group: ProcessGroup) -> AbstractContextManager[object]:
        def read(first: int, end: int) -> torch.Tensor:
            raise error

        slices = slices_of(writer.base_of(deltas))
        assert slices is not None
        dense = [name for name in deltas.parameters if ".lora_" not in name]
        return nullcontext() if group.is_main else patch.dict(slices, {dense[0]: read})

    return fault


FAULTS = {
    "config": no_config,
    "room": no_room,
    "rows": no_rows(OSError(errno.EIO, "Input/output error")),
    "memory": no_rows(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")),
}
CASES: dict[str, Callable[..., str]] = {
    "alike": alike,
    "kept": kept,
    "loads": loads,
    "repaired": repaired,
    "failing": failing,
}

if __name__ == "__main__":
    main()
    leave(0)
