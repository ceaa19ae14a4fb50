"""What the engine needs of a newer torch than a GPU machine may have, for the suite alone.

The engine itself asks for torch 2.12 or newer. In torch 2.11 `varlen_attn` knows no grouped heads and no
window, but the kernel below it does.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from trainer_node.engine.model import attention
from trainer_node.engine.model.kernels.varlen_attention import Kernel

NEEDED = {"enable_gqa", "window_size"}
OLD = "torch-varlen"


def lacks_groups() -> bool:
    """Return whether torch's varlen attention is older than the engine's call of it."""
    return not set(inspect.signature(varlen_attn).parameters) >= NEEDED


def patch() -> list[str]:
    """Replace what this torch lacks; return the names of what was replaced."""
    if not lacks_groups():
        return []
    attention._KERNELS[OLD] = _aten_varlen  # in the old one's place: kernels are tried in order
    return [OLD]


def _aten_varlen() -> Kernel:
    """Return the kernel below `varlen_attn`, which has a backward pass of its own."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        left = -1 if window is None else window - 1
        right = -1 if window is None else 0
        outputs = torch.ops.aten._flash_attention_forward(
            *(q, k, v, cu, cu, longest, longest, 0.0, window is None, False),
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
        out: Tensor = outputs[0]
        return out

    return run
