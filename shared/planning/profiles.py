"""Profiles: named sets of hyper-parameters, taken literally; planner.py makes them fit."""

from __future__ import annotations

from shared.errors import SettingsError
from shared.planning.model_name import FAMILIES
from shared.planning.recipe import Recipe
from shared.planning.rivals import RIVALS

# LoRA at alpha 32: 5e-4 * (2000 / hidden) ** p costs < 0.5% in loss against the tuned rate
# (Tinker cookbook, sweeps over 24 models).
LORA_RATE = 5e-4
RATE_EXPONENT = {"llama": 0.78, "qwen": 0.08}
OTHER_EXPONENT = 0.4
SMALL, SMALL_EXPONENT = 2000, 0.78  # hidden size; below it dense deltas of all families want the same rate
# SmolLM2-135M's hidden size, which wants .001. Below it LoRA's rate doesn't rise any more, and all families
# have the Llama's: the arena's Llama of 192 and its Qwen3 of 160 want the same, .0013 in two epochs and .0025
# in one (docs/experiments.md). Widths of 200 to 575 were not measured.
NARROW = 576
_RATE_FAMILIES = {"qwen": ("qwen",), "llama": ("llama", "smollm")}  # families of one exponent
DENSE_SHARE = 0.1  # full-rank training wants about a tenth of LoRA's rate
RATE_ALPHA = 32.0  # the alpha that LORA_RATE was measured at
# Norms want more than matrices. SmolLM2-135M ends .03 to .05 nat lower than with frozen ones at 3 and at 12
# times the dense rate; at 12 its first steps, at full rate, go astray on one data set (docs/experiments.md).
NORM_RATE = 4.0
# Of any width: the arena's Llama of hidden size 160 ends .15 and .21 nat higher at seven times as much, which
# is what its matrices want (docs/experiments.md).
EMBEDDING_RATE = DENSE_SHARE * LORA_RATE
# On a CPU: there SmolLM2-135M's steps take two fifths longer if the embeddings learn. By a CPU's prices jobs
# of two and six epochs end lower without that, on 27 of 36 (docs/experiments.md). Eight is a guess: more than
# six was not measured. Epochs are counted by the speed of scoring, which is up to 1.5 times that of training.
EMBEDDING_EPOCHS = 8.0
# Preference pairs, as a share of the rate for text: the longer a run, the lower. 40 steps do best at the full
# rate (docs/experiments.md), published recipes of about a thousand steps use 1.35e-5 where text has 1e-4.
PAIR_STEPS = 40
LEAST_PAIR_SHARE = 0.1


# At equal tokens the arena's 68 tasks end lower with it than with maximum_accuracy on 68, and than with
# winner_2026_06 on 66. Where scores and padding cost time, jobs of 90 to 2,000 rows do on 38 and 37 of 44.
# Both jobs of the demo end lower (docs/results.md).
DEFAULT_PROFILE = "auto"

PROFILES = {
    recipe.profile: recipe
    for recipe in (
        Recipe(
            profile="maximum_accuracy",
            rank=8192,
            alpha=2048.0,
            dropout=0.05,
            device_batch=128,
            activation_checkpointing=True,
            compile=True,
        ),
        # Every matrix trained whole, where that fits; everything else is what the search finds best. Where it
        # doesn't, factors of a rank that is enough for the rows that upstream sends: 14B on two GPUs trains
        # 1.4 times as many tokens as with r1024, next to which k and v are dense and the export is a whole
        # model.
        Recipe(
            profile="auto",
            full=True,
            rank=256,
            alpha=32.0,
            dropout=0.0,
            device_batch=32,
            max_length=4096,
            activation_checkpointing=True,
            compile=True,
            betas=(0.6, 0.99),  # a run of 100 steps ends .01 to .03 lower than with (.9, .999)
            arms=("lora_r32",),
            repairs=True,
            rounds=True,
            norm_rate=NORM_RATE,
            embedding_rate=EMBEDDING_RATE,
            embedding_epochs=EMBEDDING_EPOCHS,
        ),
        Recipe(profile="lora_r16", rank=16, alpha=32.0, dropout=0.0, device_batch=32),
        Recipe(profile="lora_r32", rank=32, alpha=32.0, dropout=0.0, device_batch=32, compile=True),
        Recipe(profile="lora_r128", rank=128, alpha=32.0, dropout=0.0, device_batch=32, compile=True),
        *RIVALS,
    )
}


def resolve(profile: str) -> Recipe:
    """Return the recipe of a profile. Raises SettingsError that names the known ones."""
    try:
        return PROFILES[profile]
    except KeyError:
        known = ", ".join(sorted(PROFILES))
        raise SettingsError(f"unknown profile {profile!r}; known profiles: {known}") from None


def family_of(name: str) -> str:
    """Return the family that decides the learning rate, from a model's name or its config's `model_type`."""
    lowered = name.lower()
    for family, named in _RATE_FAMILIES.items():
        if any(FAMILIES[each].search(lowered) for each in named):
            return family
    return "other"


def rate_exponent(family: str, hidden: int, *, dense: bool) -> float:
    """Return the power of 2000/hidden that a learning rate goes with.

    LoRA's hold for dense deltas above SMALL. Below it a Llama of hidden size 192 and a Qwen3 of 160 both want
    about 3.3e-4 in 100 steps of batch 4, and lose alike in one step of any size; below NARROW they want the
    same rate of LoRA, too (docs/experiments.md).
    """
    if hidden < (SMALL if dense else NARROW):
        return SMALL_EXPONENT
    return RATE_EXPONENT.get(family, OTHER_EXPONENT)


def lora_rate(family: str, hidden: int, alpha: float) -> float:
    """Peak learning rate of LoRA factors; the best goes with 1/sqrt(alpha) at any rank (arXiv 2602.06204)."""
    exponent = rate_exponent(family, hidden, dense=False)
    return LORA_RATE * float((2000 / max(hidden, NARROW)) ** exponent) * float((RATE_ALPHA / alpha) ** 0.5)


def dense_rate(family: str, hidden: int) -> float:
    """Peak learning rate of dense deltas."""
    exponent = rate_exponent(family, hidden, dense=True)
    return DENSE_SHARE * LORA_RATE * float((2000 / hidden) ** exponent)


def pair_share(steps: int) -> float:
    """Return the share of the text learning rate for a preference-pair run of that many steps."""
    return min(1.0, max(LEAST_PAIR_SHARE, float((PAIR_STEPS / max(1, steps)) ** 0.5)))
