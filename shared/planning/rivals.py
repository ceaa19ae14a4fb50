"""Recipes of others, to be compared with.

The loss is ours: the mean over examples, where theirs is over tokens. It is what upstream scores.
"""

from __future__ import annotations

import math

from shared.planning.recipe import CurveRule, Recipe, Size

EIGHT_BIT = "AdamW with 8-bit moments"

# What libraries do without tuning: their documents' defaults.
TRL_DEFAULT = Recipe(
    profile="trl_default",
    full=True,
    norm_rate=1.0,
    embedding_rate=2e-5,
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
# The winner of the text tournament of 2026-06-11. Its batches are packs of 1.1 * max(p99, 2 * median) tokens:
# at least 2.2 rows of median length.
PACK_ROWS = 2.2
LARGE = 9e9  # parameters from which it trains LoRA factors
WINNER_SIZES = tuple(
    Size(below=below, rate=rate, device_batch=round(PACK_ROWS * packs), full=below <= LARGE)
    for below, rate, packs in (
        (1e9, 1e-4, 140),
        (2e9, 1e-4, 100),
        (4e9, 7.5e-5, 48),
        (5e9, 7e-5, 40),
        (8e9, 3.5e-5, 28),
        (LARGE, 3.5e-5 * 2 / 3, 28),
        (12e9, 1e-4, 32),
        (15e9, 1e-4, 30),
        (40e9, 8e-5, 18),
        (math.inf, 8e-5, 8),
    )
)
# Its batches of pairs are not known: 64 rows. Between 2B and the largest the rate falls from 8.5e-6 to 5e-6.
WINNER_PAIR_SIZES = tuple(
    Size(below=below, rate=rate, device_batch=64, full=below <= 2e9)
    for below, rate in ((1e9, 1.35e-5), (2e9, 8.7e-6), (12e9, 8.5e-6), (math.inf, 5e-6))
)
WINNER = Recipe(
    profile="winner_2026_06",
    norm_rate=1.0,
    embedding_rate=1e-4,
    rank=128,
    alpha=512.0,
    pair_alpha=256.0,
    dropout=0.1,
    device_batch=64,
    least_batch=round(PACK_ROWS * 64),
    sizes=WINNER_SIZES,
    pair_sizes=WINNER_PAIR_SIZES,
    activation_checkpointing=True,
    optimizer=EIGHT_BIT,
    rate_by_batch=True,  # when its memory runs out it halves the batch and takes sqrt(.5) of the rate
    weight_rate=3e-3,
    pair_weight_rate=2e-4,
    decay="cosine",
    rate_floor=0.25,
    probes=True,
    # Every eighth of an epoch after the first three quarters, in 10% of the time; it ends after three points
    # that are 5% above the lowest, and averages up to eight of the lowest (the engine's rate_search.py).
    curve=CurveRule(
        rows=1000,
        first_epochs=0.75,
        every_epochs=0.125,
        most_points=1000,
        share=0.10,
        rises=3,
        rise=0.05,
        errors=0.0,
        goes_back=False,
        snapshots=8,
    ),
)
RIVALS = (TRL_DEFAULT, AUTOTRAIN_LIKE, REFERENCE_MINER, WINNER)
