"""Recipes of others, to be compared with.

The loss is ours: the mean over examples, where theirs is over tokens. It is what upstream scores.
"""

from __future__ import annotations

from shared.planning.recipe import Recipe

EIGHT_BIT = "AdamW with 8-bit moments"

# What libraries do without tuning: their documents' defaults.
TRL_DEFAULT = Recipe(
    profile="trl_default",
    full=True,
    rank=8192,
    alpha=2048.0,
    dropout=0.0,
    device_batch=8,
    max_length=1024,
    rate=2e-5,
    epochs=3.0,
)
AUTOTRAIN_LIKE = Recipe(
    profile="autotrain_like",
    rank=16,
    alpha=32.0,
    dropout=0.05,
    device_batch=8,
    max_length=2048,
    rate=2e-4,
    epochs=3.0,
)
# Upstream's own miner (core/config/base.yml): ten steps, whatever the rows and the time.
REFERENCE_MINER = Recipe(
    profile="reference_miner",
    rank=8,
    alpha=16.0,
    dropout=0.05,
    device_batch=2,
    accumulation=4,
    max_length=512,
    flash_attention=False,
    optimizer=EIGHT_BIT,
    rate=2e-4,
    decay="cosine",
    warmup_steps=10,
    epochs=1.0,
    most_steps=10,
)
RIVALS = (TRL_DEFAULT, AUTOTRAIN_LIKE, REFERENCE_MINER)
