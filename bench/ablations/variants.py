"""What is compared: ways to train that differ from the one before them in one choice."""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class Training(Struct, frozen=True, order=True):
    """One training run; the defaults are near what `auto` begins with on few rows."""

    arm: str = "everything"
    rate: float = 1.0  # factor on the plan's rate of that arm
    batch: int = 4
    epochs: float = 2.0
    per_token: bool = False  # the loss is the mean over tokens, not over examples
    decay: str = "linear"  # linear, cosine, or stable: constant, and linear in the last STABLE_TAIL
    floor: float = 0.0
    betas: tuple[float, float] = (0.6, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    held_out: bool = False  # the development rows are left out
    last_pass: float = 0.0  # then one pass over the development rows, at this share of the rate
    dropout: float = 0.0  # before LoRA's factors
    pull: float = 0.0  # times the rate: the share of the whole change so far that each step takes back
    noise: float = 0.0  # NEFTune's alpha: noise on the embeddings of what is trained on


class Variant(Struct, frozen=True, order=True):
    """What is submitted: a run, or the mean of several in other orders, its change times `scale`."""

    name: str
    training: Training = Training()
    runs: int = 1
    scale: float = 1.0
    temperature: float = 1.0  # logits are divided by it, in the last norm's weights


BASE = Variant("as auto begins")
LORA = Variant("LoRA r32", Training(arm="LoRA r32"))


def _with(name: str, **changes: Any) -> Variant:
    return Variant(name, Training(**changes))


def _six_epochs(arm: str, name: str, **changes: Any) -> Variant:
    """Return a variant where the rows repeat so often that a run learns them by heart."""
    return _with(f"{name}, six epochs", arm=arm, epochs=6.0, **changes)


def _regularisers(arm: str, name: str) -> tuple[Variant, ...]:
    """Return what could keep six epochs of an arm from learning rows by heart; first none of it."""
    return (
        _six_epochs(arm, name),
        _six_epochs(arm, f"{name}, half the rate", rate=0.5),
        _six_epochs(arm, f"{name}, decay 1 towards the base model", pull=1.0),
        _six_epochs(arm, f"{name}, decay 10 towards the base model", pull=10.0),
        _six_epochs(arm, f"{name}, noise on embeddings", noise=5.0),
    )


# Group -> what the others are compared with, then the others.
GROUPS: dict[str, tuple[Variant, ...]] = {
    "loss": (BASE, _with("mean over tokens", per_token=True)),
    "decay": (
        BASE,
        _with("cosine to 25%", decay="cosine", floor=0.25),
        _with("cosine to 0", decay="cosine"),
        _with("constant, then linear in the last 20%", decay="stable"),
    ),
    "method": (
        BASE,
        _with("matrices of the layers alone", arm="dense"),
        LORA,
        _with("LoRA r8", arm="LoRA r8"),
    ),
    "batch": (
        BASE,
        _with("batch 8", batch=8),
        _with("batch 8, 1.4 times the rate", batch=8, rate=1.4),
        _with("batch 16, twice the rate", batch=16, rate=2.0),
    ),
    "rate": (
        BASE,
        _with("a third of the rate", rate=1 / 3),
        _with("three times the rate", rate=3.0),
    ),
    "optimizer": (
        BASE,
        _with("betas .9, .999", betas=(0.9, 0.999)),
        _with("betas .9, .95", betas=(0.9, 0.95)),
        _with("clip at .1", clip=0.1),
        _with("no clip", clip=1e9),
        _with("decay .01", weight_decay=0.01),
        _with("decay .1", weight_decay=0.1),
    ),
    "development rows": (
        _with("held out", held_out=True),
        _with("held out, then one pass at a quarter of the rate", held_out=True, last_pass=0.25),
        BASE,
    ),
    "averages": (
        BASE,
        Variant("mean of 2 orders", runs=2),
        Variant("mean of 3 orders", runs=3),
        Variant("LoRA r32, mean of 2 orders at twice its rate", Training(arm="LoRA r32", rate=2.0), runs=2),
        Variant("LoRA r32, mean of 3 orders at 3 times its rate", Training(arm="LoRA r32", rate=3.0), runs=3),
    ),
    "scale": (BASE, Variant("change times .9", scale=0.9), Variant("change times 1.1", scale=1.1)),
    "temperature": (
        BASE,
        Variant("temperature .95", temperature=0.95),
        Variant("temperature 1.05", temperature=1.05),
        Variant("temperature 1.1", temperature=1.1),
    ),
    "regularisers": (*_regularisers("everything", "everything"), BASE),
    "LoRA's regularisers": (
        *_regularisers("LoRA r32", "LoRA r32"),
        _six_epochs("LoRA r32", "LoRA r32, dropout .05", dropout=0.05),
        _six_epochs("LoRA r32", "LoRA r32, dropout .1", dropout=0.1),
        LORA,
    ),
}


def variants_of(groups: list[str]) -> list[Variant]:
    """Return every variant of these groups once, the cheapest trainings first."""
    found = dict.fromkeys(variant for name in groups for variant in GROUPS[name])
    return sorted(found, key=lambda one: (one.training.arm, one.runs, one.name != BASE.name))
