"""Find matrices that were all multiplied by one factor, by the numbers that they can no longer hold.

Half of upstream's base models are damaged, two in five of those by one factor between .5 and 1.5 on a quarter
to three quarters of the matrices. A bfloat16 number has one of 128 mantissas. Multiplied by a factor and
rounded again, some mantissas come up twice and others never: each factor leaves gaps of its own, where the
weights of an untouched model have none. The gaps show which matrices were scaled, and the factor to less
than the precision of the numbers, but for a power of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray
from torch import Tensor

MANTISSAS = 128  # of bfloat16
GRID = 2**14  # different factors: about as many as have gaps of their own
SAMPLE = 2**18  # values of a matrix that are looked at: 2,000 for each mantissa
LEAST = 30 * MANTISSAS  # values; with fewer a mantissa can be missing by chance
EMPTY = 0.02  # of the mean count: below it a mantissa is a gap; two weights that happen to be odd make none
LEAST_GAPS = 2  # a factor next to a power of two leaves fewer, and changes next to nothing
MOST_ODD = 0.34  # gaps that don't fit the factor, as a share of those that do: it lies on a border of two


class Scaling(Struct, frozen=True):
    """Matrices that were multiplied by one factor, or by that factor times a power of two."""

    factor: float  # from 1 to 2
    weights: list[str]  # names of parameters


def find_scaling(matrices: Mapping[str, Tensor]) -> Scaling | None:
    """Return the factor whose gaps the most matrices have, and those; None if no matrix has gaps.

    `matrices` are a model's weights by name, in any precision and on any device.
    """
    counts = {name: count_mantissas(weight) for name, weight in matrices.items()}
    empty = {name: found < EMPTY * found.mean() for name, found in counts.items() if found.sum() >= LEAST}
    damaged = {name: found for name, found in empty.items() if found.any()}
    if not damaged:
        return None
    observed = np.stack(list(damaged.values())).astype(np.float32)
    gaps = gaps_of_factors().astype(np.float32)
    fitting = observed @ gaps.T  # matrices x factors
    odd = observed.sum(1, keepdims=True) + gaps.sum(1) - 2 * fitting
    score = (fitting - odd).sum(0)
    best = middle_of_best(score)
    fits = (fitting[:, best] >= LEAST_GAPS) & (odd[:, best] <= MOST_ODD * fitting[:, best])
    names = [name for name, fit in zip(damaged, fits, strict=True) if fit]
    return Scaling(float(factors()[best]), names) if names else None


def middle_of_best(score: NDArray[np.float32]) -> int:
    """Return the middle of the first run of highest scores: neighbouring factors may have the same gaps."""
    first = int(np.argmax(score))
    lower = np.flatnonzero(score[first:] < score[first])
    return first + (int(lower[0]) - 1 if len(lower) else len(score) - 1 - first) // 2


def count_mantissas(weight: Tensor) -> NDArray[np.int64]:
    """Return how often each mantissa of bfloat16 occurs among a matrix's normal values, int64[128]."""
    flat = weight.detach().flatten()
    if flat.numel() > SAMPLE:
        flat = flat[:: flat.numel() // SAMPLE]
    bits = flat.to(torch.bfloat16).view(torch.int16).to(torch.int32).cpu()
    exponent = (bits >> 7) & 0xFF
    mantissa = (bits & 0x7F)[(exponent > 0) & (exponent < 255)]
    counts: NDArray[np.int64] = torch.bincount(mantissa, minlength=MANTISSAS).numpy()
    return counts


@cache
def gaps_of_factors() -> NDArray[np.bool_]:
    """Return which mantissas no product with a factor has, bool[GRID, 128]."""
    product = factors()[:, None] * np.arange(MANTISSAS, 2 * MANTISSAS)
    rounded = np.where(product < 2 * MANTISSAS - 0.5, np.rint(product), np.rint(product / 2))
    rounded = np.where(rounded >= 2 * MANTISSAS, MANTISSAS, rounded)
    gaps = np.ones((GRID, MANTISSAS), bool)
    np.put_along_axis(gaps, rounded.astype(np.int64) - MANTISSAS, values=False, axis=1)
    return gaps


@cache
def factors() -> NDArray[np.float64]:
    """Return the factors that are tried, from 1 to 2, each the same ratio above the one before."""
    found: NDArray[np.float64] = 2.0 ** ((np.arange(GRID) + 0.5) / GRID)
    return found
