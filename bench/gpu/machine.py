"""The machine under the GPU suite: its versions, Podium's own self-test, and the rates that plans rest on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.gpu.check import Finding, Setting
from bench.gpu.training import GIB, device_of, scratch, synchronize
from bench.harness.tiny_jobs import ROOT
from trainer_node.worker.environment import ALLOCATORS

SMI = "index,name,memory.total,memory.used,utilization.gpu,driver_version"
SELF_TEST = "self-test here"
SELF_TEST_S = 170.0
RATE_BYTES = 2 * GIB
DRY_BYTES = 2**24


def environment(setting: Setting) -> Finding:
    """Say what runs here."""
    figures: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "gcc": shutil.which("gcc"),
        "cores": len(os.sched_getaffinity(0)),
        "allocator": {name: os.environ[name] for name in ALLOCATORS if name in os.environ},
    }
    if setting.dry:
        return Finding(figures)
    if not torch.cuda.is_available():
        return Finding(figures, ["torch sees no GPU: add --dry to try the suite on a CPU"])
    properties = torch.cuda.get_device_properties(0)
    figures |= {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "total_gib": round(properties.total_memory / GIB, 2),
        "free_gib": round(torch.cuda.mem_get_info(0)[0] / GIB, 2),
        "cuda": torch.version.cuda,
        "segments that grow": _segments_grow(),
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
        figures["nvidia-smi"] = done.stdout.strip().splitlines()
    asked = any("expandable_segments:True" in value for value in figures["allocator"].values())
    works = figures["segments that grow"] or not asked
    return Finding(figures, [] if works else ["torch's segments of memory don't grow, as they should"])


def _segments_grow() -> bool:
    """Return whether the memory that torch takes on the GPU is in segments that grow."""
    taken = torch.ones(1, device="cuda")
    grow = all(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())
    del taken
    return grow


def doctor(setting: Setting) -> Finding:
    """Run `podium doctor --self-test`; of its findings only the self-test's counts: there is no gateway."""
    home = scratch(setting, "home")
    changes = {"PODIUM_DATA_DIR": str(home), "HF_HUB_OFFLINE": "1"}
    changes |= {"PODIUM_HARDWARE": "cpu"} if setting.dry else {}
    command = [sys.executable, "-m", "podium", "doctor", "--self-test", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **changes}, timeout=SELF_TEST_S
    )
    try:
        findings = json.loads(done.stdout)
    except ValueError:
        return Finding({"log": done.stderr[-1500:]}, ["podium doctor gave no answer"])
    own = [finding for finding in findings if finding["check"] == SELF_TEST]
    faults = [finding["what"] for finding in own if finding["severity"] == "error"]
    if not own:
        faults.append("podium doctor did not say how the self-test ended")
    checks = [line for line in done.stderr.splitlines() if "self-test" in line]
    return Finding({"findings": [finding["what"] for finding in own], "log": checks[-12:]}, faults)


def rates(setting: Setting) -> Finding:
    """Measure copies from the device, hashing, and the disk that checkpoints are written to."""
    size, device = DRY_BYTES if setting.dry else RATE_BYTES, device_of(setting)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    host = torch.zeros(size, dtype=torch.uint8)
    figures = {"device to host, pageable": _copy_rate(source, host)}
    if device.type == "cuda":
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        figures["device to host, pinned"] = _copy_rate(source, pinned)
        figures["host to device, pinned"] = _copy_rate(pinned, source)
    began = time.perf_counter()
    hashlib.sha256(memoryview(host.numpy())).hexdigest()
    figures["sha256"] = size / (time.perf_counter() - began)
    figures["write and fsync"] = _write_rate(setting.folder / "rate.bin", memoryview(host.numpy()))
    return Finding({f"{name}, GB/s": round(rate / 1e9, 2) for name, rate in figures.items()})


def _copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    target.copy_(source)  # the first copy touches the memory
    device = source.device if source.is_cuda else target.device
    synchronize(device)
    began = time.perf_counter()
    target.copy_(source)
    synchronize(device)
    return float(source.numel() / (time.perf_counter() - began))


def _write_rate(path: Path, data: memoryview) -> float:
    began, left = time.perf_counter(), data
    with path.open("wb", buffering=0) as file:
        while left:
            left = left[os.write(file.fileno(), left[: 64 * 2**20]) :]
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return len(data) / seconds
