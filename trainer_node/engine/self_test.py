"""Test a slot's devices before a job depends on them: python -m trainer_node.engine.self_test FOLDER

One process per GPU, as in training; on a CPU the same code, with gloo. Each writes its answer after every
check (shared/self_test.py), so that a check that hangs or kills its process is known by name.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from msgspec.structs import replace
from torch import nn
from torch._dynamo.utils import counters

from shared.planning.hardware import PEAK_FLOPS
from shared.self_test import (
    CheckResult,
    ProcessReport,
    SelfTestRequest,
    read_request,
    write_report,
)
from trainer_node.engine.distributed.launch import Ranks, die_with_parent, rank_of
from trainer_node.engine.distributed.process_group import CPU, ProcessGroup, join, least_free_memory
from trainer_node.engine.model.attention import Form, check_kernels, slower_because
from trainer_node.engine.model.compile import missing_compiler

JOIN_S = 60.0
FORMS = (Form(9, 3), Form(32, 8, 128), Form(16, 8, 128, windowed=True))  # of 135M, 8B and Gemma-like models
FUSED_FROM = (8, 0)  # compute capability: torch's own wheels have an attention kernel for these GPUs
LEAST_FREE = 0.9  # of a GPU's memory
LEAST_SPEED = 0.25  # of a known GPU's peak: training reaches .35, a healthy GPU .6 here
FILLED = 0.8  # of the free memory of a GPU is written and read back
BLOCK = 2**28  # values, 1 GiB
SUM_VALUES = 2**24  # of the all-reduce: 64 MB
DISK_BYTES = 64 * 2**20
LEAST_DISK_FREE = 2 * 2**30
LEAST_DISK_BYTES_PER_S = 10e6


class Layer(nn.Module):
    """A layer of our own: the compiler passes over torch's containers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        return cast(torch.Tensor, self.down(nn.functional.gelu(self.up(x))))


class DeviceFault(Exception):
    """A check found something wrong."""


class DeviceWarning(Exception):
    """A check found that jobs run here, but worse than they should."""


def main(folder: Path) -> int:
    """Run all checks of this process, or start the processes that do; 0 if every check was carried out."""
    die_with_parent()
    request, rank = read_request(folder), rank_of(os.environ)
    if rank is None and request.processes > 1:
        arguments = [sys.executable, "-m", "trainer_node.engine.self_test", str(folder)]
        return Ranks(arguments, request.processes).run()
    return run_checks(folder, request, rank or 0)


def run_checks(folder: Path, request: SelfTestRequest, rank: int) -> int:
    """Run this process's checks, and write what they found after each."""
    report, group = ProcessReport(), ProcessGroup()

    def run(name: str, check: Callable[[], str]) -> bool:
        nonlocal report
        if request.checks and name not in (*request.checks, "join"):
            return True
        write_report(folder, rank, replace(report, running=name))
        began, ok, warns = time.monotonic(), True, False
        try:
            what = check()
        except DeviceWarning as warning:
            what, warns = str(warning), True
        except Exception as error:  # whatever a device brings a library to: it is the finding
            ok, what = False, explained(error)
        seconds = round(time.monotonic() - began, 2)
        result = CheckResult(name=name, ok=ok, warns=warns, what=what, seconds=seconds)
        report = ProcessReport(results=[*report.results, result])
        write_report(folder, rank, report)
        return ok

    def joined() -> str:
        nonlocal group
        group = join(request.hardware, JOIN_S)
        return "one process" if group.is_single else f"{group.world} processes"

    if not run("driver", lambda: driver(request, rank)) or not run("join", joined):
        return 1
    run("memory", lambda: memory(group, request))
    run("arithmetic", lambda: arithmetic(group.device))
    run("speed", lambda: speed(group.device, request))
    run("kernels", lambda: kernels(group.device))
    run("all_reduce", lambda: all_reduce(group))
    run("compile", lambda: compiled(group.device))
    if group.is_main:
        run("disk", lambda: disk(folder))
    return 0


def explained(error: Exception) -> str:
    """Return an error in one line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return text if isinstance(error, DeviceFault) else f"{type(error).__name__}: {text}"


def driver(request: SelfTestRequest, rank: int) -> str:
    """Use the device once: torch says here if the driver is too old for it, or has no code for the GPU."""
    if request.hardware.device == "cpu":
        return f"torch {torch.__version__} on the CPU"
    torch.cuda.init()  # raises what is wrong with the driver
    device = torch.device("cuda", rank)
    total = float(torch.ones(1000, device=device).sum())
    if total != 1000.0:
        raise DeviceFault(f"the sum of 1000 ones is {total}")
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, torch {torch.__version__} for CUDA {torch.version.cuda}"


def memory(group: ProcessGroup, request: SelfTestRequest) -> str:
    """Compare the free memory with what is stated, then write most of it and read it back."""
    free = least_free_memory(group)
    stated = request.hardware.memory_bytes
    if free is not None and free < LEAST_FREE * stated:
        raise DeviceFault(
            f"{free / 2**30:.1f} of {stated / 2**30:.1f} GiB are free: another process uses the GPU"
        )
    # One block is the pattern.
    blocks, values = (1, 2**20) if free is None else (int(FILLED * free / (4 * BLOCK)) - 1, BLOCK)
    pattern = torch.arange(values, device=group.device, dtype=torch.int32)
    written = [pattern + number for number in range(blocks)]
    for number, block in enumerate(written):
        if not torch.equal(block.sub_(number), pattern):
            raise DeviceFault(f"block {number} of {blocks} doesn't hold what was written to it")
    return f"{blocks * values * 4 / 2**30:.2f} GiB written and read back"


def arithmetic(device: torch.device, size: int = 256) -> str:
    """Multiply matrices of ones and minus ones: bf16 holds every sum of 256 of them exactly."""
    random = torch.Generator().manual_seed(0)
    left, right = (torch.randint(0, 2, (size, size), generator=random).mul(2).sub(1) for _ in range(2))
    exact = left.double() @ right.double()
    for dtype in (torch.bfloat16, torch.float32):
        found = (left.to(device, dtype) @ right.to(device, dtype)).cpu().double()
        if wrong := int((found != exact).sum()):
            raise DeviceFault(f"{wrong} of {size * size} products in {dtype} are wrong")
    return "exact in bf16 and fp32"


def speed(device: torch.device, request: SelfTestRequest) -> str:
    """Measure products in bf16; a known GPU that is far below its peak is throttled or shared."""
    size, rounds = (8192, 20) if device.type == "cuda" else (512, 2)
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    matrix @ matrix
    synchronize(device)
    began = time.perf_counter()
    for _ in range(rounds):
        matrix @ matrix
    synchronize(device)
    rate = rounds * 2 * size**3 / (time.perf_counter() - began)
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in request.hardware.device.upper()), None)
    if device.type == "cuda" and peak is not None and rate < LEAST_SPEED * peak:
        raise DeviceFault(
            f"{rate / 1e12:.0f} TFLOP/s in bf16, of {peak / 1e12:.0f}: it is throttled or shared"
        )
    return f"{rate / 1e12:.3g} TFLOP/s in bf16"


def kernels(device: torch.device) -> str:
    """Test the attention that training would use, and say which it is.

    Attention by document, where a fused kernel should work, is no fault: it is exact, so a slow job still
    delivers, and what broke the kernels (a wheel, a driver) is mostly the same on all slots of a machine. A
    refusal would lose every job of the box. Its operator must learn of it: small models train at less than
    half their speed, because no step is recorded as a CUDA graph.
    """
    chosen = check_kernels(device, FORMS)
    slower = slower_because(chosen)
    if slower and device.type == "cuda" and torch.cuda.get_device_capability(device) >= FUSED_FROM:
        raise DeviceWarning(slower)
    names = " and ".join(dict.fromkeys(kernel.name for kernel in chosen))
    return f"{len(FORMS)} forms of attention are right: {names}"


def all_reduce(group: ProcessGroup, values: int = SUM_VALUES) -> str:
    """Add a tensor up over all processes, twice; the second time is measured."""
    if group.is_single:
        return "one process"
    for _ in range(2):
        tensor = torch.full((values,), float(group.rank + 1), device=group.device)
        synchronize(group.device)
        began = time.perf_counter()
        group.total(tensor)
        synchronize(group.device)
        seconds = time.perf_counter() - began
        wanted = group.world * (group.world + 1) / 2
        if wrong := int((tensor != wanted).sum()):
            raise DeviceFault(f"{wrong} of {values} sums over {group.world} processes are wrong")
    return f"{4 * values / seconds / 1e9:.2f} GB/s over {group.world} processes"


def compiled(device: torch.device) -> str:
    """Compile a layer, and compare its output and gradient with the same layer's without."""
    if missing := missing_compiler(device):
        return f"not tried: layers are not compiled without {missing}"
    torch.manual_seed(0)
    layer = Layer().to(device)
    given = torch.randn(32, 64, device=device)
    layer(given).square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
    layer.zero_grad()
    graphs = counters["stats"]["unique_graphs"]
    try:
        layer.compile()
        layer(given).square().sum().backward()
    except Exception as error:  # slower, but no fault: training then does without, too
        return f"layers will not be compiled: {explained(error)}"
    found = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
    if not worst < 1e-2:
        raise DeviceFault(f"a compiled layer's gradient is off by {worst:.3g} of its largest value")
    if counters["stats"]["unique_graphs"] == graphs:
        return "layers will not be compiled: the compiler skipped one silently"
    return f"a compiled layer's gradient is off by {worst:.1g} of its largest value"


def disk(folder: Path) -> str:
    """Write and sync a file where runs are kept."""
    free = shutil.disk_usage(folder).free
    if free < LEAST_DISK_FREE:
        raise DeviceFault(f"{free / 2**30:.1f} GiB of the disk are free: checkpoints and exports need more")
    path, data = folder / "written", os.urandom(2**20)
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(DISK_BYTES // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    rate = DISK_BYTES / (time.perf_counter() - began)
    if rate < LEAST_DISK_BYTES_PER_S:
        raise DeviceFault(f"the disk writes {rate / 1e6:.1f} MB/s")
    return f"{rate / 1e6:.0f} MB/s written and synced, {free / 1e9:.0f} GB free"


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device != CPU:
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    status = main(Path(sys.argv[1]).absolute())
    sys.stdout.flush()
    os._exit(status)  # a library that hangs when it is taken apart is no fault
