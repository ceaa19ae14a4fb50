"""Whole jobs on a GPU, killed in training and started again: load, plan, train, export, verify."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from bench.gpu.check import Finding, Setting, Skip
from bench.gpu.training import device_of, hardware_of
from bench.gpu.worker_process import MODULE, PARALLEL
from bench.harness import tiny_jobs
from shared.messages.hardware import Hardware
from shared.messages.runs import OutcomeStatus, Phase, Progress, decode_progress
from shared.net import free_port
from trainer_node.engine.context import read_record

JOB_S = 100.0  # of a job on a GPU, by its clock: with 35 s there was no time to go on after a kill
DRY_TOKEN_S = 12.0  # of one on the CPU, on the token clock
ROWS = 400
WAIT_S = 150.0
TOLD = 12  # last lines of a worker's log that a fault shows


class Run:
    """One job in a folder of its own, whose worker can be killed and started again."""

    def __init__(
        self,
        setting: Setting,
        name: str,
        *,
        profile: str = "maximum_accuracy",
        processes: int = 0,
        parallel: str | None = None,
    ) -> None:
        data = tiny_jobs.write_rows(setting.folder / f"{name}.json", ROWS)
        now = time.time()
        clock: dict[str, Any] = {"clock": "wall", "start_at": now, "ready_by": now + JOB_S}
        if setting.dry:
            clock = {"ready_by": DRY_TOKEN_S, "checkpoint_interval_s": 2.0}
        hardware = hardware_of(device_of(setting)) if setting.dry else gpus(processes or 1)
        self.job = tiny_jobs.write_job(
            setting.folder / name, data, profile=profile, processes=processes, hardware=hardware, **clock
        )
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # of a check, which is a worker's
        if parallel:
            self.environment[PARALLEL] = parallel
        if parallel == "fsdp2" and not processes:  # a group of one process, which sharding needs
            self.environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            self.environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    @property
    def folder(self) -> Path:
        """Return the run folder."""
        return self.job.parent

    def start(self) -> subprocess.Popen[bytes]:
        """Start a worker, in this process's group: it ends with the check."""
        command = [sys.executable, "-m", MODULE, str(self.job)]
        with (self.folder / "worker.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=tiny_jobs.ROOT, env=self.environment)

    def finish(self) -> None:
        """Run to the end."""
        self.start().wait(WAIT_S)

    def kill_in_training(self) -> None:
        """Run until there is a checkpoint, then kill -9; its ranks die with it."""
        worker, until = self.start(), time.monotonic() + WAIT_S
        while not list((self.folder / "checkpoints").glob("step-*")) and time.monotonic() < until:
            if worker.poll() is not None:
                break
            time.sleep(0.02)
        worker.kill()
        worker.wait()

    def figures(self) -> dict[str, Any]:
        """Return how the job ended, and with which plan."""
        outcome, known = tiny_jobs.outcome_of(self.job), read_record(self.folder)
        metrics = msgspec.to_builtins(outcome.metrics) if outcome and outcome.metrics else {}
        plan = known[1] if known else None
        return {
            "status": outcome.status.value if outcome else "no outcome",
            "error": outcome.error if outcome else None,
            "metrics": metrics,
            "parallel": plan.parallel if plan else None,
            "compile": plan.compile if plan else None,
            "reserve_s": round(plan.reserve_s, 1) if plan else None,
            "messages": [line.message for line in self.progress() if line.message],
        }

    def progress(self) -> list[Progress]:
        """Return what the run reported."""
        path = self.folder / "progress.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [decode_progress(line) for line in lines]

    def log(self) -> str:
        """Return the end of the worker's output."""
        return "\n".join((self.folder / "worker.log").read_text().splitlines()[-TOLD:])

    def faults(self, *, resumed: bool) -> list[str]:
        """Return what is wrong with how the job ended."""
        outcome = tiny_jobs.outcome_of(self.job)
        name = self.folder.name
        if outcome is None or outcome.status is not OutcomeStatus.READY:
            return [f"{name}: it did not end ready: {outcome.error if outcome else self.log()}"]
        metrics, found = outcome.metrics, []
        if Phase.VERIFY not in {line.phase for line in self.progress()}:
            found.append(f"{name}: its export was not verified")
        if resumed and (metrics is None or metrics.resumes < 1):
            found.append(f"{name}: it did not resume from its checkpoint")
        return found


def gpus(count: int) -> Hardware:
    """Return the first GPUs of this machine as a node would report them."""
    return msgspec.structs.replace(hardware_of(torch.device("cuda", 0)), count=count)


def worker(setting: Setting) -> Finding:
    """Run whole jobs on one device: dense, killed in training and resumed; then LoRA, undisturbed."""
    dense = Run(setting, "dense")
    dense.kill_in_training()
    dense.finish()
    lora = Run(setting, "lora", profile="lora_r16")
    lora.finish()
    faults = [*dense.faults(resumed=True), *lora.faults(resumed=False)]
    return Finding({"dense": dense.figures(), "lora": lora.figures()}, faults)


def sharded_worker(setting: Setting) -> Finding:
    """Run a whole job under FSDP2, killed in training and resumed: over all GPUs, or a group of one."""
    count = 0 if setting.dry else torch.cuda.device_count()
    run = Run(setting, "fsdp2", processes=count if count > 1 else 0, parallel="fsdp2")
    run.kill_in_training()
    run.finish()
    figures, faults = run.figures(), run.faults(resumed=True)
    if figures["parallel"] != "fsdp2":
        faults.append(f"its plan says {figures['parallel']}")
    return Finding({"processes": max(1, count), **figures}, faults)


def layouts(setting: Setting) -> Finding:
    """Run a whole job in each other layout that the machine has: DDP over 2, 4 and 8 devices."""
    most = 2 if setting.dry else torch.cuda.device_count()
    counts = [count for count in (2, 4, 8) if count <= most]
    if not counts:
        raise Skip("this machine has one GPU")
    figures, faults = {}, []
    for count in counts:
        run = Run(setting, f"ddp-{count}", processes=count, profile="lora_r16")
        run.finish()
        figures[run.folder.name] = run.figures()
        faults += run.faults(resumed=False)
    return Finding(figures, faults)
