"""What training does about steps that go wrong: skip one, go back after several in a row, in the end give up.

Norms and losses come in as numbers that are the same in every process, so every process judges alike, and a
resumed run repeats the judgement: all of it is part of a checkpoint.
"""

from __future__ import annotations

import math

from msgspec import Struct
from msgspec.structs import replace

IN_A_ROW = 3  # bad steps after which the run goes back: one bad batch may give one or two
MOST_RETURNS = 4  # the rate is then a sixteenth of the plan's: what still diverges is not the rate's fault
SETTLED = 20  # losses that the running mean must have before another is compared with it
KEEP = 0.95  # of the running mean after each step: it remembers about 20
# A loss is far above its mean if it is above by all three: an untrained model is at most 11 nats away, a
# batch of few rows varies by its own deviation, and a loss near 0 by a large share of itself.
FAR_NATS = 1.0
FAR_SHARE = 0.5
FAR_DEVIATIONS = 6.0


class Health(Struct, frozen=True, kw_only=True):
    """The steps of a training run as far as they went wrong, and the loss that is usual in it."""

    skipped: int = 0  # steps without a finite gradient: they changed no weight
    in_a_row: int = 0  # bad steps up to now: skipped, or with a loss far above its mean
    returns: int = 0  # times that the run went back to earlier weights
    seen: int = 0  # losses in the mean
    mean: float = 0.0
    variance: float = 0.0

    @property
    def must_return(self) -> bool:
        """Return whether earlier weights are better than these."""
        return self.in_a_row >= IN_A_ROW and not self.is_hopeless

    @property
    def is_hopeless(self) -> bool:
        """Return whether training must end: it went back as often as it may, and went wrong again."""
        return self.returns > MOST_RETURNS

    @property
    def rate_share(self) -> float:
        """Return the share of the plan's learning rate that is left."""
        return float(0.5**self.returns)

    def after(self, loss: float, norm: float) -> Health:
        """Return the health after a step with this loss and gradient norm."""
        if not is_sound(loss, norm):
            return replace(self, skipped=self.skipped + 1, in_a_row=self.in_a_row + 1)
        if self._is_far(loss):
            return replace(self, in_a_row=self.in_a_row + 1)
        weight = max(1.0 / (self.seen + 1), 1.0 - KEEP)
        difference = loss - self.mean
        return replace(
            self,
            in_a_row=0,
            seen=self.seen + 1,
            mean=self.mean + weight * difference,
            variance=(1.0 - weight) * (self.variance + weight * difference**2),
        )

    def returned(self, then: Health) -> Health:
        """Return the health of a run that goes back to where it was in the health `then`."""
        return replace(then, skipped=self.skipped, returns=self.returns + 1, in_a_row=0)

    def _is_far(self, loss: float) -> bool:
        allowed = max(FAR_NATS, FAR_SHARE * self.mean, FAR_DEVIATIONS * math.sqrt(self.variance))
        return self.seen >= SETTLED and loss > self.mean + allowed


def is_sound(loss: float, norm: float) -> bool:
    """Return whether a step may change the weights."""
    return math.isfinite(loss) and math.isfinite(norm)
