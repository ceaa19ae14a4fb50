"""Training of the engine's own kind on a model with random weights: made, stepped, timed, measured."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from msgspec import Struct
from transformers import AutoModelForCausalLM

from bench.gpu.check import Setting
from bench.gpu.shapes import config_of, random_rows
from shared.clock import WallClock
from shared.messages.hardware import Hardware
from shared.messages.offers import DatasetType, FileFormat, TaskType
from shared.messages.runs import WorkerJob
from shared.net import free_port
from shared.planning.hardware import PEAK_FLOPS
from shared.planning.memory_fit import estimate, layout_of, split
from shared.planning.model_shape import ModelShape
from shared.planning.plan import Plan
from shared.planning.profiles import resolve
from shared.planning.throughput import Costs, Rows, flops_per_token
from trainer_node.engine.assemble import assemble
from trainer_node.engine.context import JobData, RunContext, RunRecord
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.distributed.process_group import ProcessGroup
from trainer_node.engine.memory.oom import release
from trainer_node.engine.model.attention import choose_kernels
from trainer_node.engine.model.shape import model_shape
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.search.strategy.refits import NOISE
from trainer_node.engine.signals import Stop
from trainer_node.engine.train import loop
from trainer_node.engine.train.state import TrainState

GIB = 2**30
DRY_CAPACITY = 256
RATE = 1e-5  # random weights have little to learn: the rate must only not make them worse
UNLIMITED = 2**60  # bytes that a plan says it needs, so that no average of the weights is kept next to it


class Case(Struct, frozen=True, kw_only=True):
    """One way to train one model."""

    model: str
    rank: int | None = None  # of LoRA; None: dense deltas
    capacity: int = 16384
    recomputed: bool = False
    compiled: bool = False
    sharded: bool = False  # FSDP2 over one process
    layers: int | None = None  # of the model, if not all
    packs: int = 1  # of a step
    noisy: bool = False  # noise on the embeddings

    @property
    def name(self) -> str:
        """Return the case in words."""
        parts = [self.model, "dense" if self.rank is None else f"LoRA {self.rank}", f"{self.capacity} tokens"]
        parts += [f"{self.layers} layers"] if self.layers else []
        parts += [f"{self.packs} packs"] if self.packs > 1 else []
        parts += [word for word in ("recomputed", "compiled", "sharded", "noisy") if getattr(self, word)]
        return ", ".join(parts)


class Training:
    """A training run of a case, ready for its first step."""

    def __init__(self, case: Case, setting: Setting) -> None:
        release_memory()
        self.case, self.setting, self.device = case, setting, device_of(setting)
        self.capacity = DRY_CAPACITY if setting.dry else case.capacity
        config = config_of(case.model, dry=setting.dry, layers=case.layers)
        self.shape: ModelShape = model_shape(config)
        self.plan = plan_of(case, self.shape, self.capacity)
        self.rows = random_rows(3 * self.capacity, self.shape.vocab, dry=setting.dry)
        choose_kernels(config, self.device)
        torch.manual_seed(0)
        with self.device:  # random numbers for 8 billion weights take a CPU minutes
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if case.sharded:
            join_alone(self.device)
            model = model.cpu()
        self.state = self._assembled(model)
        self.state.deltas.model.train()

    def _assembled(self, model: torch.nn.Module) -> TrainState:
        folder, job = self.setting.folder, job_for(self.device)
        group = ProcessGroup(0, 1, self.device)
        run = RunContext(job, folder, WallClock(), Reporter(folder / "progress", "t", "a"), Stop(), group)
        record = RunRecord(
            fingerprint="",
            base_losses=[1.0],
            train_examples=len(self.rows),
            train_tokens=int(self.rows.lengths.sum()),
            dropped={},
            costs=Costs(),
        )
        return assemble(run, record, self.plan, model, JobData(self.rows, self.rows, {}, 4096), None)

    def steps(self, count: int) -> dict[str, Any]:
        """Take one step, then `count` timed ones; return seconds, tokens per second and losses."""
        first_s, losses = self.take(1)
        tokens = self.state.tokens
        seconds, more = self.take(count)
        rate = (self.state.tokens - tokens) / seconds
        rounded = [round(loss, 4) for loss in losses + more]
        return {
            "first_s": round(first_s, 2),
            "step_s": round(seconds / count, 4),
            "tokens_per_s": round(rate),
            "mfu": self._mfu(rate),
            "losses": rounded,
            **self._memory(),
        }

    def take(self, count: int) -> tuple[float, list[float]]:
        """Take steps; return their seconds and losses."""
        synchronize(self.device)
        began, losses = time.perf_counter(), []
        for _ in range(count):
            assert loop.one_step(self.state, 1.0, Stop())
            losses.append(self.state.last_loss)
        synchronize(self.device)
        seconds = time.perf_counter() - began
        self.state.read_results()
        late = self.state.lag  # steps after which a step's loss is read
        return seconds, [*losses, self.state.last_loss][late : late + count]

    def _mfu(self, rate: float) -> float | None:
        """Return the share of the GPU's peak, by the arithmetic that training asks for; None on a CPU."""
        peak = peak_flops(self.device)
        work = flops_per_token(self.shape, self.plan.modules, rows_of(self.rows), checkpointing=False)
        return None if peak is None else round(rate * work / peak, 3)

    def _memory(self) -> dict[str, float]:
        if self.device.type == "cpu":
            return {}
        return {
            "peak_gib": round(torch.cuda.max_memory_allocated(self.device) / GIB, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved(self.device) / GIB, 2),
        }

    def estimate_gib(self) -> float:
        """Return what the planner expects of the tensors alone, without the process."""
        layout = layout_of(self.plan, cpu=False)
        memory = estimate(self.shape, self.plan.modules, layout, 0.0)
        return (memory.total - memory.process) / GIB


def plan_of(case: Case, shape: ModelShape, capacity: int) -> Plan:
    """Return a plan that trains exactly the case."""
    profile = "maximum_accuracy" if case.rank is None else "lora_r16"
    recipe = resolve(profile)
    rank = 2**31 if case.rank is None else case.rank  # above any break-even: dense
    return Plan(
        profile=profile,
        modules=split(shape, recipe, rank),
        dropout=0.0,
        noise=NOISE if case.noisy else 0.0,
        lr_lora=RATE,
        lr_dense=RATE,
        max_length=4096,
        capacity=capacity,
        packs_per_step=case.packs,
        max_epochs=1000.0,
        dtype="bfloat16",
        parallel="fsdp2" if case.sharded else "single",
        devices=1,
        activation_checkpointing=case.recomputed,
        compile=case.compiled,
        eval_batch=1,
        expected_tokens_per_s=1.0,
        expected_steps=1,
        reserve_s=0.0,
        memory_bytes=UNLIMITED,
    )


def job_for(device: torch.device) -> WorkerJob:
    """Return a job that never ends by itself; only its hardware matters."""
    return WorkerJob(
        task_id="gpu",
        task="gpu",
        slot="a",
        task_type=TaskType.INSTRUCT,
        model="podium/random",
        model_path="",
        dataset="",
        file_format=FileFormat.JSON,
        dataset_type=DatasetType(),
        start_at=time.time(),
        ready_by=time.time() + 1e6,
        hardware=hardware_of(device),
    )


def hardware_of(device: torch.device) -> Hardware:
    """Return one device as a node would report it."""
    if device.type == "cpu":
        return Hardware(device="cpu", count=1, memory_bytes=8 * GIB)
    properties = torch.cuda.get_device_properties(device)
    return Hardware(device=properties.name, count=1, memory_bytes=properties.total_memory)


def rows_of(examples: Examples) -> Rows:
    """Return what the planner knows of rows."""
    tokens = int(examples.lengths.sum())
    return Rows(len(examples), tokens / len(examples), examples.label_tokens / tokens)


def peak_flops(device: torch.device) -> float | None:
    """Return a GPU's peak in bf16, if it is a known one."""
    if device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(device).upper()
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def join_alone(device: torch.device) -> None:
    """Be a process group of one, which sharding needs."""
    if dist.is_initialized():
        return
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, rank=0, world_size=1)


def device_of(setting: Setting) -> torch.device:
    """Return the device that the checks use."""
    return torch.device("cpu") if setting.dry else torch.device("cuda", 0)


def release_memory() -> None:
    """Free what the case before held, and forget its peak."""
    gc.unfreeze()
    release()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def scratch(setting: Setting, name: str) -> Path:
    """Return a new folder of a check."""
    folder = setting.folder / name
    folder.mkdir()
    return folder
