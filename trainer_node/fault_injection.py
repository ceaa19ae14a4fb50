"""The moments at which a kill of the node is worst, each reachable on purpose.

A process whose environment names one of them kills itself with SIGKILL when it comes by; tests and
`python -m bench faults` do that to real nodes. The variable is no setting: no file can
switch it on.
"""

from __future__ import annotations

import os
import signal
from enum import StrEnum
from typing import Final

VARIABLE: Final = "TRAINER_NODE_KILL_AT"


class FaultPoint(StrEnum):
    """Row F2 of the fault matrix, in the order of a job's life."""

    FOUND = "F2.1"  # a job was found; nothing is written
    CLAIMED = "F2.2"  # the claim is in the chain; no worker was started
    SPAWNED = "F2.3"  # the worker runs; nothing on disk says who it is
    TRAINING = "F2.4"  # in the middle of training
    READY = "F2.5"  # the last step is done, the export on disk; nothing is announced
    ANNOUNCED = "F2.6"  # `submitting` is in the chain; nothing is stored
    STORED = "F2.7"  # the submission is stored; no result names it yet
    ENDED = "F2.8"  # the result is in the chain; nothing is cleaned up


_WANTED: Final = os.environ.get(VARIABLE)


def fault_point(here: FaultPoint) -> None:
    """End this process as kill -9 does if it was started to end here; else nothing happens."""
    if here == _WANTED:
        os.kill(os.getpid(), signal.SIGKILL)
