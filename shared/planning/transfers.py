"""How long a model takes to arrive here, and a submission to get to the hub."""

from __future__ import annotations

from msgspec import Struct


class Transfers(Struct, frozen=True):
    """What a job must move over the network, in bytes a second; None: nothing."""

    download_bytes_per_s: float | None = None  # None: the model is on this machine
    upload_bytes_per_s: float | None = None  # None: submissions stay on this machine

    def download_s(self, parameters: int) -> float:
        """Return how long weights in 16 bits take to arrive."""
        return 2 * parameters / self.download_bytes_per_s if self.download_bytes_per_s else 0.0

    def upload_s(self, size: int) -> float:
        """Return how long a submission of that many bytes takes to be stored."""
        return size / self.upload_bytes_per_s if self.upload_bytes_per_s else 0.0


HERE = Transfers()
UPLOAD_SHARE = 0.25  # of a job's time is kept for the upload at most; what takes longer is not accepted
