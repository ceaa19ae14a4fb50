"""Noise for tokens that are trained on: what each one's is drawn by, and how large it is (NEFTune).

It belongs to the step and the document: it is the same in any pack, on any device and any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MASK = 2**32 - 1
DOCUMENTS, CHANNELS = 0x9E3779B9, 0x85EBCA6B  # odd: neighbours are far apart after a product with them

Integers = TypeVar("Integers", NDArray[np.int64], Tensor)


@dataclass(frozen=True)
class Noise:
    """The noise of one step."""

    alpha: float  # it is at most alpha / sqrt(tokens of the document * hidden size)
    seed: int  # of the job's order of rows
    step: int

    def of_documents(
        self, numbers: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return what each token of a pack draws by, int64[T], and alpha / sqrt(tokens), fp32[T].

        `numbers` are those of its documents among the job's, with `lengths` tokens each. The padding has no
        noise.
        """
        seeds, most = np.zeros(capacity, np.int64), np.zeros(capacity, np.float32)
        tokens = int(lengths.sum())
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        order = scrambled(scrambled(np.array([self.seed & MASK])) + self.step & MASK)
        of_document = scrambled((numbers * DOCUMENTS + order) & MASK)
        seeds[:tokens] = scrambled((np.repeat(of_document, lengths) + np.arange(tokens) - starts) & MASK)
        most[:tokens] = np.repeat(self.alpha / np.sqrt(lengths), lengths)
        return seeds, most


def scrambled(numbers: Integers) -> Integers:
    """Return 32-bit numbers that look random for any numbers below 2 ** 32, neighbours too.

    A multiply-xorshift hash (lowbias32): integers alone, so that every device gives the same.
    """
    numbers = (numbers ^ (numbers >> 16)) * 0x7FEB352D & MASK
    numbers = (numbers ^ (numbers >> 15)) * 0x846CA68B & MASK
    return numbers ^ (numbers >> 16)


def uniform(seeds_T: Tensor, width: int) -> Tensor:
    """Return numbers from -1 to 1 by each token's seed, fp32[T, width]."""
    channels = torch.arange(width, device=seeds_T.device) * CHANNELS
    numbers = scrambled((seeds_T[:, None] + channels) & MASK)
    return numbers.float() * 2.0**-31 - 1.0
