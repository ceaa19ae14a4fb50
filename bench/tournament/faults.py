"""Faults in contest containers: each must leave a valid submission and status 0, and a line in the log.

The worker killed, by the bench or by the kernel's out-of-memory killer; too little memory, rows that are no
rows, data that ends in the middle, a disk without room, a model without its tokenizer.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from msgspec import Struct

from bench.tournament.container import kill_worker
from bench.tournament.memory_taker import take_memory
from bench.tournament.mounts import Mounted

TOKENIZER: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


def nothing(mounted: Mounted) -> None:
    """Leave the mounts as they are."""


def spoil_rows(mounted: Mounted) -> None:
    """Put rows between the others that aren't what the task says."""
    (path,) = (mounted.root / "cache" / "datasets").glob("*.json")
    rows = json.loads(path.read_text())
    wrong = [{}, {"instruct": None, "output": "x"}, {"instruct": ["a"], "output": {"b": 1}}]
    broken = {"instruct": "\ud800", "output": "\x00"}
    path.write_text(json.dumps([*rows[:100], *wrong, broken, *rows[100:]]))


def cut_data(mounted: Mounted) -> None:
    """Cut the data off in the middle of a row."""
    (path,) = (mounted.root / "cache" / "datasets").glob("*.json")
    path.write_bytes(path.read_bytes()[:1000])


def take_tokenizer(mounted: Mounted) -> None:
    """Remove the model's tokenizer."""
    for name in TOKENIZER:
        (mounted.model / name).unlink(missing_ok=True)


class Fault(Struct, frozen=True):
    """One fault: what is done to the mounts, what happens during the run, and what the log has to say."""

    says: str  # a part of the log
    damage: Callable[[Mounted], None] = nothing
    worker_ends: tuple[Callable[[int], None], ...] = ()  # how its workers are ended, one after the other
    memory: str | None = None  # of the container, in place of the usual
    disk: str | None = None  # size of the volume of submissions
    trains: bool = False  # whether a trained submission has to be there


FAULTS: Final = {
    # A checkpoint between them starts the count of attempts again.
    "worker killed": Fault(
        "(?s:worker started +attempt=[23].*){2}", worker_ends=(kill_worker,) * 2, trains=True
    ),
    "out of memory": Fault(
        "out-of-memory killer ended it.*(?s:.*)worker started +attempt=2",
        worker_ends=(take_memory,),
        memory="2g",
        trains=True,
    ),
    "little memory": Fault("need at least .* GB|out-of-memory|memory ran out", memory="450m"),
    "wrong rows": Fault("rows dropped", damage=spoil_rows, trains=True),
    "data cut off": Fault("training ends without a result", damage=cut_data),
    "full disk": Fault("No space left|disk", disk="3m"),
    "no tokenizer": Fault("tokenizer", damage=take_tokenizer),
}


@contextmanager
def spoilt(fault: Fault | None, mounted: Mounted) -> Iterator[None]:
    """Spoil a task's mounts before its container starts; release a small disk afterwards."""
    if fault is None:
        yield
        return
    fault.damage(mounted)
    volume = mounted.root / "app" / "checkpoints"
    if fault.disk:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={fault.disk}", "tmpfs", volume], check=True)
    try:
        yield
    finally:
        if fault.disk:
            subprocess.run(["umount", volume], check=True)
