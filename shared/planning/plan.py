"""A plan as data: what is trained, how, and where it differs from the profile."""

from __future__ import annotations

from msgspec import Struct

from shared.messages.offers import TaskType
from shared.planning.model_shape import Extras, ModulePlan
from shared.planning.recipe import CurveRule

# What people compare runs by. A rate of 0 trains nothing and is left out.
NUMBERS = (
    *("profile", "trained_parameters", "lr_lora", "lr_dense", "lr_norms", "lr_embeddings", "dropout"),
    *("max_length", "capacity", "packs_per_step", "max_epochs", "expected_steps", "expected_tokens_per_s"),
    *("train_s", "dtype", "parallel", "devices"),
)
_IN_NUMBERS = "the plan in numbers: "
SUPPORTED_TASKS = frozenset({TaskType.INSTRUCT, TaskType.CHAT, TaskType.DPO})


class DataStats(Struct, frozen=True, kw_only=True):
    """The planner's input about the tokenised training rows; a preference pair is one row."""

    examples: int
    tokens: int
    label_tokens: int
    max_length: int  # longest row, tokens


class Repair(Struct, frozen=True):
    """What is undone in the base model before it is trained."""

    factor: float  # that the weights were multiplied by
    weights: list[str]  # names of parameters


class Plan(Struct, frozen=True, kw_only=True):
    """Everything the engine does in one run, resolved to numbers."""

    profile: str
    modules: list[ModulePlan]
    dropout: float  # before LoRA's factors; dense deltas have none
    lr_lora: float
    lr_dense: float
    lr_norms: float = 0.0
    lr_embeddings: float = 0.0  # and of the output matrix
    extras: Extras = Extras()
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.03  # share of the training budget
    decay: str = "linear"  # from the peak to `rate_floor`: linear or cosine; or constant
    rate_floor: float = 0.0  # share of the peak that the rate falls to
    noise: float = 0.0  # on embeddings while training, at most noise / sqrt(tokens of a row * hidden size)
    curve: CurveRule = CurveRule()
    max_length: int  # longer rows are dropped, as the scorer drops them
    capacity: int  # tokens of one pack; every pack is padded to it
    packs_per_step: int  # packs of one optimiser step, over all devices and accumulation steps
    pack_examples: int | None = None  # most examples of one pack; None: as many as its tokens allow
    max_epochs: float
    most_steps: int | None = None  # optimiser steps after which training ends, if there are so many
    dtype: str  # "bfloat16" or "float32": what matrix products run in
    parallel: str  # "single", "ddp" or "fsdp2"
    devices: int
    activation_checkpointing: bool
    compile: bool
    eval_batch: int
    expected_tokens_per_s: float
    expected_steps: int
    reserve_s: float  # kept for choose, export, verify before `ready_by`
    memory_bytes: int  # estimated peak on one device
    deviations: list[Deviation] = []
    dev_examples: int = (
        1000  # development rows that one evaluation can afford; the engine takes the first so many
    )
    ddp_bucket_mb: int = 200
    train_s: float = 0.0  # estimate of the time that is left to train
    repair: Repair | None = None

    @property
    def trained_parameters(self) -> int:
        """Return the number of weights that are trained."""
        return sum(module.parameters for module in self.modules) + self.extras.parameters


class Step(Struct, frozen=True):
    """The size of one optimiser step, and how many there will be."""

    batch: int  # examples asked for, after halving
    capacity: int
    packs: int
    examples: float  # mean examples that the packs hold
    steps: int
    wanted_steps: int  # how many there would be at the recipe's batch


class Deviation(Struct, frozen=True):
    """One difference between the plan and its profile, with the reason."""

    what: str
    wanted: str
    got: str
    reason: str


def in_numbers(plan: Plan) -> str:
    """Return the plan as one line for people and programs; `numbers_in` reads it."""
    values = {name: getattr(plan, name) for name in NUMBERS}
    words = (
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
        if value
    )
    return _IN_NUMBERS + " ".join(words)


def numbers_in(text: str) -> dict[str, str | int | float]:
    """Return the values of a line that `in_numbers` has written; none of another line."""
    if not text.startswith(_IN_NUMBERS):
        return {}
    pairs = (word.partition("=") for word in text.removeprefix(_IN_NUMBERS).split())
    return {name: _value(value) for name, _, value in pairs if value}


def _value(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
