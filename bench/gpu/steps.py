"""Steps of training on a GPU: what compiling gives, what memory takes, how fast each model trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from msgspec.structs import replace
from torch._dynamo.utils import counters

from bench.gpu import older_torch
from bench.gpu.check import Finding, Setting
from bench.gpu.training import GIB, Case, Training, release_memory
from trainer_node.engine.memory.oom import is_out_of_memory
from trainer_node.engine.train import loop

COMPILED_CASES = (Case(model="llama-1b"), Case(model="llama-1b", recomputed=True))
LOSS_TOLERANCE = 0.02  # of a compiled layer's loss: other kernels round otherwise
# Of two packs: while the second is computed the gradients of the first are there, as the planner counts.
MEMORY_CASES = tuple(
    replace(case, packs=2)
    for case in (
        Case(model="llama-1b"),
        Case(model="llama-1b", recomputed=True),
        Case(model="qwen3-0.6b", capacity=32768),
        Case(model="qwen2.5-0.5b", capacity=32768),
        Case(model="llama-8b", rank=16, capacity=8192),
        Case(model="llama-8b", rank=128, recomputed=True),
        Case(model="gemma3-1b", rank=128),
        Case(model="smollm2-135m", capacity=32768),
    )
)
MEMORY_SHARE = 0.9  # of a GPU's memory: a case that is estimated to need less must fit
RECORDED_CASES = (
    Case(model="smollm2-135m", capacity=1536),
    Case(model="smollm2-135m", capacity=8192),
    Case(model="smollm2-135m", rank=128, capacity=1536),
    Case(model="smollm2-135m", rank=128, capacity=1536, noisy=True),
    Case(model="qwen2.5-0.5b", capacity=4096),
    Case(model="gemma3-1b", rank=16, capacity=1536),
    Case(model="smollm2-135m", capacity=8192, compiled=True),
)
RECORDED_STEPS = 12
LEAST_ESTIMATE, MOST_ESTIMATE = -0.03, 0.15  # of the measured peak
SPEED_CASES = (
    Case(model="smollm2-135m", compiled=True),
    Case(model="smollm2-135m", rank=128, compiled=True),
    Case(model="qwen2.5-0.5b", capacity=32768, compiled=True),
    Case(model="llama-1b", compiled=True),
    Case(model="llama-8b", rank=128, recomputed=True, compiled=True),
    Case(model="llama-8b", recomputed=True, sharded=True, layers=6),
)
STEPS, DRY_STEPS = 6, 2
BALLOON_LEAVES = 9 * GIB  # of a GPU's memory: too little for a step of 1B, enough for a recomputed one


def compiled(setting: Setting) -> Finding:
    """Compare compiled layers with plain ones: seconds, loss, graphs."""
    older_torch.patch()
    figures: dict[str, Any] = {}
    faults = []
    count = DRY_STEPS if setting.dry else STEPS
    for case in COMPILED_CASES[:1] if setting.dry else COMPILED_CASES:
        torch._dynamo.reset()
        counters.clear()
        plain = Training(case, setting).steps(count)
        fast = Training(replace(case, compiled=True), setting).steps(count)
        off = losses_off(plain, fast)
        graphs = counters["stats"].get("unique_graphs", 0)
        gain = round(plain["step_s"] / fast["step_s"], 3)
        figures[case.name] = {"plain": plain, "compiled": fast, "gain": gain, "graphs": graphs, "off": off}
        setting.keep(figures)
        if not off <= LOSS_TOLERANCE:
            faults.append(f"{case.name}: compiled losses are off by {off:.3g}")
        if not graphs:
            faults.append(f"{case.name}: nothing was compiled")
    return Finding(figures, faults)


def losses_off(plain: dict[str, Any], fast: dict[str, Any]) -> float:
    """Return how far the losses of two ways to take the same steps are apart, as a share of their size."""
    pairs = zip(plain["losses"], fast["losses"], strict=True)
    return float(max(abs(a - b) / (1 + abs(a)) for a, b in pairs))


def memory(setting: Setting) -> Finding:
    """Compare the planner's estimate with the peak that torch counts; it is to be in the promised range."""
    older_torch.patch()
    figures: dict[str, Any] = {}
    faults = []
    for case in MEMORY_CASES[:2] if setting.dry else MEMORY_CASES:
        training = Training(case, setting)
        estimated = training.estimate_gib()
        found = steps_in_memory(training)
        del training
        figures[case.name] = {"estimate_gib": round(estimated, 2), **found}
        setting.keep(figures)
        if "cause" in found and estimated * GIB < MEMORY_SHARE * total_memory():
            faults.append(f"{case.name}: {estimated:.1f} GiB are estimated, and all there is was too little")
        if peak := found.get("peak_gib"):
            error = estimated / peak - 1
            figures[case.name]["error"] = round(error, 3)
            if not LEAST_ESTIMATE <= error <= MOST_ESTIMATE:
                faults.append(f"{case.name}: the estimate is {error:+.1%} off the peak of {peak:.1f} GiB")
    return Finding(figures, faults)


def steps_in_memory(training: Training) -> dict[str, Any]:
    """Return the figures of two steps, or that memory ran out in them."""
    try:
        return training.steps(2)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"cause": "memory ran out"}


def total_memory() -> int:
    """Return the bytes of the first GPU; 0 without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def recorded(setting: Setting) -> Finding:
    """Compare passes that are recorded as a CUDA graph with computed ones: seconds, loss."""
    older_torch.patch()
    figures: dict[str, Any] = {}
    faults = []
    count = DRY_STEPS if setting.dry else RECORDED_STEPS
    for case in RECORDED_CASES[:1] if setting.dry else RECORDED_CASES:
        training = Training(case, setting)
        training.state.recorded = None
        plain = training.steps(count)
        del training
        training = Training(case, setting)
        graph, model = training.state.recorded, training.state.deltas.model
        fast = training.steps(count)
        off, gain = losses_off(plain, fast), round(plain["step_s"] / fast["step_s"], 3)
        figures[case.name] = {"plain": plain, "recorded": fast, "gain": gain, "off": off}
        setting.keep(figures)
        if not off <= LOSS_TOLERANCE:
            faults.append(f"{case.name}: recorded losses are off by {off:.3g}")
        if not setting.dry and (graph is None or not model.recordable):
            faults.append(f"{case.name}: nothing was recorded")
        del training, graph, model
    return Finding(figures, faults)


def throughput(setting: Setting) -> Finding:
    """Measure tokens per second and the share of the GPU's peak (MFU) of six models."""
    older_torch.patch()
    figures = {}
    for case in SPEED_CASES:
        # A CPU compiles each of them in half a minute: the check before has shown that it can be done.
        training = Training(replace(case, compiled=case.compiled and not setting.dry), setting)
        figures[case.name] = training.steps(DRY_STEPS if setting.dry else STEPS)
        setting.keep(figures)
        del training
    broken = [name for name, found in figures.items() if not all(map(math.isfinite, found["losses"]))]
    return Finding(figures, [f"{name}: its loss is not finite" for name in broken])


def out_of_memory(setting: Setting) -> Finding:
    """Run out of memory in a step: is it recognised, and does the next rung work in the same process?"""
    older_torch.patch()
    training = Training(Case(model="llama-1b"), setting)
    training.steps(1)
    if setting.dry:
        return Finding({"dry": "a CPU's memory is not filled for a check"})
    spare = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    balloon = torch.empty(int(spare - BALLOON_LEAVES), dtype=torch.uint8, device=training.device)
    faults, figures = [], {"balloon_gib": round(balloon.numel() / GIB, 1), "kind": "none"}
    try:
        training.steps(1)
        faults.append("the step did not run out of memory: the check proves nothing")
    except Exception as error:
        figures["kind"] = type(error).__name__
        if not is_out_of_memory(error):
            faults.append(f"it is not recognised: {type(error).__name__}: {str(error)[:200]}")
    training.state.plan = replace(training.state.plan, activation_checkpointing=True)
    loop.shrink(training.state)
    release_memory()
    figures["recomputed"] = training.steps(2)
    return Finding(figures, faults)
