"""How uneven the lengths of completions are."""

import numpy as np
import pytest

from bench.ablations.spread import variation
from trainer_node.engine.data.examples import IGNORED, Examples


def labelled(*counts: int) -> Examples:
    """Return rows of six tokens, of which so many at the end have a label."""
    labels = np.full((len(counts), 6), IGNORED, dtype=np.int32)
    for row, count in enumerate(counts):
        labels[row, 6 - count :] = 1
    offsets = 6 * np.arange(len(counts) + 1, dtype=np.int64)
    return Examples(np.zeros(labels.size, dtype=np.int32), labels.ravel(), offsets)


def test_the_spread_is_of_the_label_tokens_alone() -> None:
    assert variation(labelled(3, 3, 3)) == 0.0
    assert variation(labelled(1, 5)) == pytest.approx(2 / 3)
