"""Where a step's time goes on a GPU: how long it computes, how often it is asked to, and by which kernels."""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.gpu import older_torch
from bench.gpu.check import Finding, Setting
from bench.gpu.training import Case, Training

CASES = (
    Case(model="smollm2-135m"),
    Case(model="qwen2.5-0.5b", capacity=32768),
    Case(model="llama-1b"),
    Case(model="llama-8b", rank=128, recomputed=True),
)
STEPS, DRY_STEPS = 5, 1
PROFILED = 2
MOST_KERNELS = 14
NAME_LENGTH = 90


def kernel_times(setting: Setting) -> Finding:
    """Compare the time that kernels take with the time of a step, and name the longest ones."""
    older_torch.patch()
    figures: dict[str, Any] = {}
    for case in CASES[:1] if setting.dry else CASES:
        training = Training(case, setting)
        training.state.recorded = None  # single kernels: what a graph would start at once
        step_ms = 1000 * training.steps(DRY_STEPS if setting.dry else STEPS)["step_s"]
        figures[case.name] = {"step_ms": round(step_ms, 1), **profiled(training, step_ms)}
        setting.keep(figures)
        del training
    return Finding(figures)


def profiled(training: Training, step_ms: float) -> dict[str, Any]:
    """Return what the profiler says of some steps, each figure for one of them."""
    on_gpu = training.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        training.take(PROFILED)
    rows = [
        (one.key, (one.self_device_time_total if on_gpu else one.self_cpu_time_total) / 1000, one.count)
        for one in found.key_averages()
    ]
    total = sum(ms for _, ms, _ in rows) / PROFILED
    longest = sorted(rows, key=lambda row: -row[1])[:MOST_KERNELS]
    return {
        "computing_ms": round(total, 1),
        "busy": round(total / step_ms, 3),
        "launches": sum(count for _, _, count in rows) // PROFILED,
        "longest": {
            key[:NAME_LENGTH]: {"ms": round(ms / PROFILED, 2), "calls": count // PROFILED}
            for key, ms, count in longest
        },
    }
