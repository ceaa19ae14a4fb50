"""How many packs one optimiser step has, how many examples a pack may hold, and what padding costs."""

from __future__ import annotations

from shared.planning.memory_fit import round_up
from shared.planning.throughput import FILL

LIMITED = 0.8  # of the examples that fill a pack: a share above it is as good as a full pack


def step_size(
    batch: int, mean_length: float, longest: int, most_capacity: int, devices: int
) -> tuple[int, int]:
    """Return the capacity and the number of packs that hold about `batch` examples, over all devices."""
    share = batch * mean_length / devices  # tokens of one device
    capacity = max(round_up(longest), min(most_capacity, round_up(share)))
    return capacity, devices * max(1, round(share / (FILL * capacity)))


def full_batch(devices: int, longest: int, mean_length: float) -> float:
    """Return how many examples fill the smallest packs, one on each device: they hold the longest row."""
    return devices * round_up(longest) / mean_length


def pack_limit(batch: int, mean_length: float, capacity: int, devices: int) -> int | None:
    """Return the most examples of one pack, if one pack on each device holds clearly more than the batch.

    None if the tokens alone limit them.
    """
    share = batch / devices
    return max(1, round(share)) if share < LIMITED * FILL * capacity / mean_length else None


def padding(batch: int, full: float) -> float:
    """Return how many times the tokens of its rows a batch costs.

    `full` examples fill the smallest packs (`full_batch`). A batch that is clearly smaller has packs of its
    own size, by `pack_limit`.
    """
    held = FILL * full
    return held / batch if batch < LIMITED * held else 1.0
