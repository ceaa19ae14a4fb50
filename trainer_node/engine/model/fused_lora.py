"""LoRA layers as one autograd function each: what PEFT computes, with fewer passes over large tensors.

PEFT's layer scales its factors' product and adds it to the frozen one in tensors of their own, forward
and backward: six passes over [T, out] or [T, in] per layer in addition to the products. Here the scale goes
into
the small factor and both sums into the products' accumulation, so that none is left, and only the
input and [T, rank] are kept for the backward pass. Shape letters: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn

ADAPTER = "default"


def fuse_lora(network: nn.Module) -> int:
    """Let a PEFT model's plain LoRA linear layers train fused; returns how many."""
    fused = 0
    for layer in network.modules():
        if type(layer) is peft.tuners.lora.Linear and _is_plain(layer):
            # By its class: a function of each layer's own would be compiled again for each layer.
            layer.__class__ = FusedLinear
            fused += 1
    return fused


def unfuse_lora(network: nn.Module) -> int:
    """Let the layers compute as PEFT's do again; returns how many."""
    fused = [layer for layer in network.modules() if isinstance(layer, FusedLinear)]
    for layer in fused:
        layer.__class__ = peft.tuners.lora.Linear
    return len(fused)


class FusedLinear(peft.tuners.lora.Linear):
    """PEFT's layer, fused where it trains.

    It keeps PEFT's own way wherever it isn't exactly that: merged, switched off, or without gradients
    (scoring keeps the stock rounding).
    """

    def forward(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        """Compute as PEFT does: [..., I] -> [..., O]."""
        if not torch.is_grad_enabled() or self.disable_adapters or self.merged or rest or options:
            stock: Tensor = super().forward(x, *rest, **options)
            return stock
        base = self.base_layer
        down_RI, up_OR = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            bias = None if base.bias is None else base.bias.to(dtype)
            x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
            out = _LoraLinear.apply(x_TI, base.weight.to(dtype), bias, down_RI, up_OR, self.scaling[ADAPTER])
        return out.view(*x.shape[:-1], out.shape[-1])


def _is_plain(layer: Any) -> bool:
    return (
        list(layer.lora_A) == [ADAPTER]
        and not layer.lora_variant
        and layer.lora_A[ADAPTER].bias is None
        and layer.lora_B[ADAPTER].bias is None
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and type(layer.base_layer) is nn.Linear
    )


class _LoraLinear(torch.autograd.Function):
    """x W' + scale (x A') B', with gradients for x, A and B; factors in fp32, products in x's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        down_RI: Tensor,
        up_OR: Tensor,
        scale: float,
    ) -> Tensor:
        down, up = down_RI.to(x_TI.dtype), (up_OR * scale).to(x_TI.dtype)
        inner_TR = x_TI @ down.T
        out_TO = x_TI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_TI, weight_OI.T)
        ctx.save_for_backward(x_TI, weight_OI, down, up, inner_TR)
        ctx.scale = scale
        return out_TO.addmm_(inner_TR, up.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_TO = gradients[0]
        x_TI, weight_OI, down, up, inner_TR = ctx.saved_tensors
        grad_inner_TR = grad_TO @ up
        grad_x = (grad_TO @ weight_OI).addmm_(grad_inner_TR, down) if ctx.needs_input_grad[0] else None
        grad_down = (grad_inner_TR.T @ x_TI).float()
        grad_up = (grad_TO.T @ inner_TR).float().mul_(ctx.scale)
        return grad_x, None, None, grad_down, grad_up, None
