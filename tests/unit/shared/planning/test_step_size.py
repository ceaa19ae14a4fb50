"""The packs of one optimiser step, the most examples of a pack, and what padding costs."""

import pytest

from shared.planning.step_size import pack_limit, padding, step_size
from shared.planning.throughput import FILL


@pytest.mark.parametrize(
    ("batch", "longest", "devices", "limit"),
    [
        (4, 192, 1, 4),  # 192 tokens hold 8 examples
        (2, 192, 1, 2),
        (8, 1000, 4, 2),  # two on each of four devices
        (2, 1000, 4, 1),  # no pack is empty
        (32, 192, 1, None),
        (8, 192, 1, None),  # 7.8 fill it
    ],
)
def test_packs_of_the_longest_row_hold_no_more_examples_than_the_batch(
    batch: int, longest: int, devices: int, limit: int | None
) -> None:
    mean = 24.0
    capacity, _ = step_size(batch, mean, longest, 8192, devices)
    assert pack_limit(batch, mean, capacity, devices) == limit


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("batch", [4, 8, 12, 16, 28, 32, 64, 128])
def test_padding_is_what_limited_packs_leave_empty(batch: int, devices: int) -> None:
    mean, longest = 24.0, 192
    capacity, packs = step_size(batch, mean, longest, longest, devices)
    full = FILL * capacity / mean  # examples
    limit = pack_limit(batch, mean, capacity, devices)
    assert padding(batch, devices * capacity / mean) == pytest.approx(full / (limit or full))
    assert limit is None or packs == devices
