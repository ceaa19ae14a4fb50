"""Several training processes on one GPU: what a small model's steps leave idle, others can use."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from typing import Any

from bench.gpu import older_torch
from bench.gpu.check import Finding, Setting
from bench.gpu.training import Case, Training, synchronize

CASES = (Case(model="smollm2-135m", capacity=1536), Case(model="smollm2-135m", capacity=8192))
COUNTS, DRY_COUNTS = (1, 2, 4, 8), (1, 2)
STEPS, DRY_STEPS = 15, 2
READY_S = 60.0


def sharing(setting: Setting) -> Finding:
    """Measure the tokens per second of 1, 2, 4 and 8 processes that train on the first GPU at once."""
    figures: dict[str, Any] = {}
    faults = []
    for case in CASES[:1] if setting.dry else CASES:
        figures[case.name] = {}
        for count in DRY_COUNTS if setting.dry else COUNTS:
            rate = together(case, setting, count)
            figures[case.name][str(count)] = round(rate)
            setting.keep(figures)
            if not rate:
                faults.append(f"{case.name}: {count} processes at once failed")
    return Finding(figures, faults)


def together(case: Case, setting: Setting, count: int) -> float:
    """Return the tokens per second of all processes together; 0 if one of them fails."""
    fork = multiprocessing.get_context("fork")  # CUDA is not in use here, and imports take ten seconds
    ready: Barrier = fork.Barrier(count)
    told: SimpleQueue[float] = fork.SimpleQueue()
    processes = [fork.Process(target=_train, args=(case, setting, ready, told)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        return 0.0
    return sum(told.get() for _ in processes)


def _train(case: Case, setting: Setting, ready: Barrier, told: SimpleQueue[float]) -> None:
    """In a process of its own: take steps when all are ready, and tell the rate."""
    try:
        older_torch.patch()
        training = Training(case, setting)
        training.steps(1)
        ready.wait(READY_S)
        began, tokens = time.perf_counter(), training.state.tokens
        training.steps(DRY_STEPS if setting.dry else STEPS)
        synchronize(training.device)
        told.put((training.state.tokens - tokens) / (time.perf_counter() - began))
    except BaseException:
        ready.abort()  # the others need not wait
        raise
