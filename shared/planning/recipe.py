"""A recipe: every hyper-parameter that a profile names, before anything is made to fit."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace


class CurveRule(Struct, frozen=True, kw_only=True):
    """When the development rows are measured during training, and which rise of their loss ends a run."""

    rows: int = 200  # of one point: enough to see a turn of .02 nat
    first_epochs: float = 0.5  # no point before: at a high learning rate the first points mislead
    every_epochs: float = 0.25
    most_points: int = 16  # of a whole run; points lie further apart if it would have more
    share: float = 0.05  # of the training time may be spent measuring
    rises: int = 2  # points in a row that must lie above the lowest one
    rise: float = 0.0  # by more than this share of its loss
    errors: float = 2.0  # and the newest by so many standard errors of the paired difference
    goes_back: bool = True  # to the weights of the lowest point, and the rate falls to its end early
    snapshots: int = 1  # the weights of so many of the lowest points are kept


class Size(Struct, frozen=True, kw_only=True):
    """What a recipe says of models with fewer than `below` parameters."""

    below: float
    rate: float
    device_batch: int
    full: bool = False


class Recipe(Struct, frozen=True, kw_only=True):
    """Every hyper-parameter that a profile names."""

    profile: str
    rank: int
    alpha: float
    dropout: float
    full: bool = False  # every weight is trained, without factors; `rank` is for models that are too large
    norm_rate: float = (
        0.0  # of norms, as a multiple of the dense rate, where all matrices are dense; 0: frozen
    )
    embedding_rate: float = (
        0.0  # of embeddings and output matrix, likewise, unless `rate` is given; 0: frozen
    )
    embedding_epochs: float = 0.0  # a CPU with time for fewer leaves them frozen
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
    betas: tuple[float, float] = (0.9, 0.999)
    rate: float | None = None  # peak learning rate; None: see `lora_rate` and `dense_rate`
    decay: str = "linear"  # how the rate falls from its peak: linear or cosine
    warmup: float = 0.03  # share of the training
    warmup_steps: int = 0  # instead of a share
    epochs: float | None = None  # None: see `planner.epoch_limit`
    most_steps: int | None = None  # optimiser steps after which training ends
    rate_floor: float = 0.0  # share of the peak that the rate falls to
    rate_by_batch: bool = False  # a smaller batch lowers the rate, by the square root
    weight_rate: float = 0.0  # rate of text for dense weights of RMS 1 and 1e9 parameters; 0: `rate`
    pair_weight_rate: float = 0.0
    least_batch: int = 0  # examples that are accumulated where the devices hold fewer
    sizes: tuple[Size, ...] = ()  # by size of the model, ascending; replaces rate, batch and method
    pair_sizes: tuple[Size, ...] = ()  # for preference pairs
    pair_alpha: float | None = None
    curve: CurveRule = CurveRule()
    arms: tuple[str, ...] = ()  # profiles to try besides this one; with any, the engine searches
    probes: bool = False  # the engine compares rates in short runs before the one that counts
    repairs: bool = False  # weights that were scaled are restored before training
    rounds: bool = False  # trained matrices are rounded by what they do to their inputs, not to the nearest

    @property
    def searches(self) -> bool:
        """Return whether rate, epochs, batch and method are found by trials, not given."""
        return bool(self.arms) or self.probes

    def sized(self, parameters: int, devices: int, *, pairs: bool) -> Recipe:
        """Return the recipe for a model of that size on that many devices."""
        sizes = self.pair_sizes if pairs else self.sizes
        if not sizes:
            return self
        size = next((one for one in sizes if parameters < one.below), sizes[-1])
        return replace(
            self,
            full=size.full,
            norm_rate=self.norm_rate if size.full else 0.0,
            embedding_rate=self.embedding_rate if size.full else 0.0,
            dropout=0.0 if size.full else self.dropout,
            alpha=self.pair_alpha or self.alpha if pairs else self.alpha,
            rate=size.rate,
            device_batch=size.device_batch,
            accumulation=max(1, self.least_batch // (size.device_batch * devices)),
        )
