"""Peak main memory of eight processes that load and export one large sharded model.

    python -m bench host_memory [--billions 2] [--processes 8]

A random Llama in bf16 is written to disk; gloo processes load it as FSDP2 does, with LoRA factors, and write
the whole model and the adapter. On a CPU the shards themselves are in main memory. Left out is computing,
which gathers layers in a GPU's memory. Counted is what the processes have on top of their imports: sampled
by proportional set size (mapped pages count once), and the sum of each process's own peak, an upper bound.
The last line is one JSON object: `{"model_bytes", "peak", "upper_bound"}`, peaks as multiples of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from shared.clock import WallClock
from shared.messages.hardware import Hardware
from shared.messages.offers import DatasetType, FileFormat, TaskType
from shared.messages.runs import Metrics, WorkerJob
from shared.net import free_port
from shared.planning.hardware import machine_memory, parse_hardware
from shared.planning.memory_fit import split
from shared.planning.plan import DataStats, Plan
from shared.planning.planner import make_plan
from shared.planning.profiles import resolve

LAYER_PARAMETERS = 60_821_504  # of the model below
SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 65536,
    "tie_word_embeddings": False,
}
RANK = 16
EVERY_S = 0.05


def main() -> None:
    """Measure, or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--billions", type=float, default=2.0)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        one_process(options.rank_in)
        return
    folder = Path(tempfile.mkdtemp(prefix="podium-host-memory-"))
    try:
        print(json.dumps(measure(folder, options.billions, options.processes)))
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, billions: float, processes: int) -> dict[str, float]:
    """Write the model, start the processes, and sample their memory until they end."""
    free = machine_memory()[1]
    most = free / 2 / 2e9  # the export is in the page cache, too
    if billions > most:
        print(f"{free / 1e9:.1f} GB of memory are free: {most:.2f} billion weights instead of {billions}")
        billions = most
    size = write_random_model(folder / "model", billions)
    port = str(free_port())
    command = [sys.executable, "-m", "bench.performance.host_memory", "--rank-in", str(folder)]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": str(processes), "GLOO_SOCKET_IFNAME": "lo"}
    running = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(processes)]
    peak, start = 0, 0
    while any(process.poll() is None for process in running):
        present = sum(proportional(process.pid) for process in running)
        if (folder / "begun").exists():
            peak = max(peak, present)
        else:
            start = present
        time.sleep(EVERY_S)
    assert all(process.returncode == 0 for process in running), "a process failed"
    own = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    exported = sum(path.stat().st_size for path in (folder / "whole").glob("*.safetensors"))
    assert exported > 0.99 * size, "the export is not the whole model"
    print(f"model {size / 1e9:.2f} GB; imports {start / 1e9:.2f} GB; peak with them {peak / 1e9:.2f} GB")
    print("seconds: " + ", ".join(f"{name} {one:.1f}" for name, one in own[0]["seconds"].items()))
    return {
        "model_bytes": size,
        "peak": round((peak - start) / size, 3),
        "upper_bound": round(sum(one["peak"] - one["start"] for one in own) / size, 3),
    }


def proportional(pid: int) -> int:
    """Return a process's memory, with its share of the pages that others map too; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def own_memory(field: str) -> int:
    """Return one of this process's figures: `VmRSS`, or its peak `VmHWM`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def write_random_model(folder: Path, billions: float) -> int:
    """Write a random model, file by file; the bytes of its weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from trainer_node.engine.safetensors_file import write_tensors

    ends = 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    layers = max(1, round((billions * 1e9 - ends) / LAYER_PARAMETERS))
    config = LlamaConfig(num_hidden_layers=layers, **SIZES)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    index: dict[str, str] = {}
    block = 0.02 * torch.randn(2**22, dtype=torch.bfloat16)
    for number, name in enumerate(shapes):
        count = shapes[name].numel()
        values = block.repeat(-(-count // len(block)))[:count].view(shapes[name].shape)
        index[name] = f"model-{number:05d}.safetensors"
        write_tensors(folder / index[name], {name: values})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(2 * one.numel() for one in shapes.values())


def one_process(folder: Path) -> None:
    """Load the model and export it, as one of the group's processes."""
    import torch

    from trainer_node.engine.assemble import load_base
    from trainer_node.engine.context import RunContext
    from trainer_node.engine.distributed.process_group import destroy, join
    from trainer_node.engine.distributed.sharding import sharded
    from trainer_node.engine.distributed.weight_slices import slices_of
    from trainer_node.engine.export import sharded_writer
    from trainer_node.engine.model.adapters import add_deltas
    from trainer_node.engine.model.loading import load_config
    from trainer_node.engine.model.shape import model_shape
    from trainer_node.engine.reporter import Reporter
    from trainer_node.engine.signals import Stop

    torch.set_num_threads(1)
    hardware = Hardware(device="cpu", count=1, memory_bytes=machine_memory()[0])
    group = join(hardware, 600.0)
    job = job_of(folder, hardware)
    run = RunContext(job, folder, WallClock(), Reporter(Path(os.devnull), "t", "a"), Stop(), group)
    plan = plan_of(model_shape(load_config(job.model_path)), group.world)
    started = own_memory("VmRSS")
    group.gather_objects(None)
    if group.is_main:
        time.sleep(1.0)
        (folder / "begun").touch()
    group.gather_objects(None)
    seconds: dict[str, float] = {}
    began = time.monotonic()
    model = load_base(run, plan)
    slices = slices_of(model)
    assert slices is not None
    deltas = sharded(add_deltas(model, plan, 0), plan, group, slices, 0)
    group.gather_objects(None)
    seconds["load"], began = time.monotonic() - began, time.monotonic()
    metrics = Metrics(base_loss=0.0)
    whole = partial(sharded_writer.write_model, deltas, job, group=group)
    sharded_writer.write_folder(whole, plan, job, metrics, folder / "whole", group)
    sharded_writer.write(deltas, plan, job, metrics, folder / "adapter", group)
    seconds["export"] = time.monotonic() - began
    found = {"start": started, "peak": own_memory("VmHWM"), "seconds": seconds}
    (folder / f"rank-{group.rank}.json").write_text(json.dumps(found))
    group.gather_objects(None)
    destroy(group)


def job_of(folder: Path, hardware: Hardware) -> WorkerJob:
    """Return a job on the model."""
    return WorkerJob(
        task_id="t",
        task="t",
        slot="a",
        task_type=TaskType.INSTRUCT,
        model="random/model",
        model_path=str(folder / "model"),
        dataset="",
        file_format=FileFormat.JSON,
        dataset_type=DatasetType(),
        start_at=time.time(),
        ready_by=time.time() + 3600.0,
        hardware=hardware,
    )


def plan_of(shape: Any, devices: int) -> Plan:
    """Return a plan with small LoRA factors on every matrix of the sharded model."""
    recipe = resolve("lora_r16")
    rows = DataStats(examples=1000, tokens=100_000, label_tokens=50_000, max_length=512)
    plan = make_plan(recipe, shape, rows, parse_hardware("cpu-64x512GB"), 36_000_000)
    modules = split(shape, recipe, RANK)
    return replace(plan, modules=modules, parallel="fsdp2", devices=devices, dtype="bfloat16")


if __name__ == "__main__":
    main()
