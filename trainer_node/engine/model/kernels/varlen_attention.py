"""Fused attention over packs on CUDA: what each library calls it, and in which order it wants what.

Every function here returns a kernel, or raises ModuleNotFoundError with the name of one of MODULES where its
library isn't installed. Any other error says that the library is broken. If a kernel computes right on this
GPU is tested by `attention.py` before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

# (q_THD, k_TKD, v_TKD, cu_seqlens, max_seqlen, scale, window) -> out_THD
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None], Tensor]
MODULES: Final = frozenset(
    ["flash_attn", "flash_attn.flash_attn_interface", "flash_attn.cute", "flash_attn_interface"]
).union(["torch.nn.attention.varlen"])


def flash_attn() -> Kernel:
    """Return the varlen kernel of the flash-attn package (2.x).

    From its own file: flash-attn-4 has a package of the same name without it, which is not a broken one.
    """
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    return _causal(flash_attn_varlen_func)


def flash_attn_3() -> Kernel:
    """Return the varlen kernel of FlashAttention 3 (Hopper)."""
    from flash_attn_interface import flash_attn_varlen_func

    return _causal(flash_attn_varlen_func)


def _causal(function: Callable[..., Any]) -> Kernel:
    """Return the kernel of a function that versions 2 and 3 call alike."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        reach = (-1, -1) if window is None else (window - 1, 0)
        return _output(
            function(q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True, window_size=reach)
        )

    return run


def flash_attn_4() -> Kernel:
    """Return the varlen kernel of flash-attn-4, by its own function.

    torch's call of it (activate_flash_attention_impl) can't unpack what the pinned wheel returns.
    """
    from flash_attn.cute import flash_attn_varlen_func

    def run(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        borders = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
        reach = (None, None) if window is None else (window - 1, 0)
        return _output(
            flash_attn_varlen_func(q, k, v, **borders, softmax_scale=scale, causal=True, window_size=reach)
        )

    return run


def _output(answer: Any) -> Tensor:
    """Return a kernel's output; some versions hand over the softmax's sums with it."""
    return answer[0] if isinstance(answer, tuple) else answer


def torch_varlen() -> Kernel:
    """Return the varlen kernel in torch's own CUDA wheels.

    Calling it is a TypeError before torch 2.12, whose function takes neither grouped heads nor windows.
    """
    from torch.nn.attention.varlen import varlen_attn

    def run(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        reach = (-1 if window is None else window - 1, 0)
        return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scale, window_size=reach, enable_gqa=True)

    return run
