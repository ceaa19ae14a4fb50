"""A recipe: every hyper-parameter that a profile names, before anything is made to fit."""

from __future__ import annotations

from msgspec import Struct


class Recipe(Struct, frozen=True, kw_only=True):
    """Every hyper-parameter that a profile names."""

    profile: str
    rank: int
    alpha: float
    dropout: float
    full: bool = False  # every weight is trained, without factors; `rank` is for models that are too large
    targets: tuple[str, ...] = ()  # kinds of linear modules, by the ends of their paths; none: all
    device_batch: int  # examples of one step on one device
    accumulation: int = 1
    eval_batch: int = 64
    max_length: int = 8192  # tokens
    bf16: bool = True
    flash_attention: bool = True
    activation_checkpointing: bool = False
    compile: bool = False
    ddp_bucket_mb: int = 200
    optimizer: str = "AdamW"
    rate: float | None = None  # peak learning rate; None: see `lora_rate` and `dense_rate`
    decay: str = "linear"  # how the rate falls from its peak: linear or cosine
    warmup: float = 0.03  # share of the training
    warmup_steps: int = 0  # instead of a share
    epochs: float | None = None  # None: see `planner.epoch_limit`
    most_steps: int | None = None  # optimiser steps after which training ends
    arms: tuple[str, ...] = ()  # profiles to try besides this one; with any, the engine searches

    @property
    def searches(self) -> bool:
        """Whether rate, epochs, batch and method are found by trying, not given."""
        return bool(self.arms)
