"""A slot's node: its lease and heartbeats, and what an operator asks of it."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from shared.messages.encoding import decoder
from shared.messages.hardware import GpuStatus, Hardware
from shared.messages.runs import Phase


class Lease(Struct, frozen=True, kw_only=True):
    """A node's exclusive, expiring claim on its slot (value in the `leases` bucket)."""

    slot: str
    node: str
    epoch: int  # 0 in the creating write itself: then the epoch is that write's revision
    hardware: Hardware
    at: float = 0.0


class Heartbeat(Struct, frozen=True, kw_only=True):
    """A node's heartbeat, every second."""

    slot: str
    node: str
    epoch: int  # 0 = no lease held
    hardware: Hardware
    gpus: list[GpuStatus] = []
    memory_total: int = 0
    memory_used: int = 0
    task: str | None = None
    phase: Phase | None = None
    step: int = 0
    worker_alive: bool = False
    at: float = 0.0
    version: str = ""  # of Podium
    faults: list[str] = []  # that the slot's self-test found: it is offered no job
    warnings: list[str] = []  # likewise: it is offered jobs, which are slower than they should be
    upload_bytes_per_s: float | None = None  # of this node's uploads to a hub; none yet: null
    download_bytes_per_s: float | None = None  # of models from a hub; none yet: null


class ControlKind(StrEnum):
    """Requests of an operator to a slot's node."""

    LOOK = "look"  # its task has new records in the logs: poll now
    REQUEUE = "requeue"  # end the worker, restart the job with the attempts counted from 1


class Control(Struct, frozen=True, kw_only=True):
    """A request to the node that holds a slot; the node answers with a ControlAnswer."""

    kind: ControlKind
    task: str
    reason: str = ""
    gateway: str = ""


class ControlAnswer(Struct, frozen=True):
    """Whether it was done; if not, why not."""

    done: bool
    reason: str = ""


decode_lease = decoder(Lease)

decode_heartbeat = decoder(Heartbeat)

decode_control = decoder(Control)

decode_control_answer = decoder(ControlAnswer)
