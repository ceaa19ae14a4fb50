"""Attention kernels on a GPU: the error of each on each form that models ask for."""

from __future__ import annotations

import time
from typing import Any

from bench.gpu import older_torch
from bench.gpu.check import Finding, Setting
from bench.gpu.training import device_of
from trainer_node.engine.model import attention
from trainer_node.engine.model.attention import TOLERANCE, Form

FORMS = (
    Form(9, 3, 64),
    Form(14, 2, 64),
    Form(32, 8, 64),
    Form(16, 8, 128),
    Form(32, 8, 128),
    Form(12, 4, 96),
    Form(4, 1, 256),
    Form(16, 16, 128),
    Form(32, 8, 128, windowed=True),
    Form(4, 1, 256, windowed=True),
)
SLOW = "sdpa-per-document"  # right everywhere, and no varlen kernel


def kernels(setting: Setting) -> Finding:
    """Measure every kernel on every form; it is a fault if a form has none but the slow one."""
    patched, device = older_torch.patch(), device_of(setting)
    figures: dict[str, Any] = {"patched": patched}
    faults = []
    for form in FORMS[:2] if setting.dry else FORMS:
        name = " ".join(f"{key}={value}" for key, value in form._asdict().items())
        figures[name] = {kernel: _measured(kernel, device, form) for kernel in attention._KERNELS}
        right = [kernel for kernel, found in figures[name].items() if found.get("error", 1.0) <= TOLERANCE]
        if not right or (device.type == "cuda" and right == [SLOW]):
            faults.append(f"{name}: only {', '.join(right) or 'nothing'} computes right")
    return Finding(figures, faults)


def _measured(name: str, device: Any, form: Form) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        error = attention._tested(attention._KERNELS[name](), device, form)
        return {"error": round(error, 5), "seconds": round(time.perf_counter() - began, 2)}
    except Exception as error:  # not installed, or whatever it raises on this form
        return {"cause": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"}
