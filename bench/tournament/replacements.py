"""SIGKILL in the middle of replacing a submission: one process replaces without a pause, and is killed.

Each kill comes 3 to 80 ms after the start: together they hit every part of a replacement: linking, syncing,
looking at the files, the exchange, removing what was there before.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Final

from msgspec import Struct

from bench.harness.tiny_jobs import MODEL
from trainer_node.contest.safetensors_file import read_shapes, write_zeros
from trainer_node.contest.submission import SubmissionFolder, linked
from trainer_node.contest.untrained_adapter import adapter_config

SOURCES: Final = (8, 64, 512)  # ranks of the adapters that replace each other
SHORTEST_S, LONGEST_S = 0.003, 0.08


class Replaced(Struct, frozen=True):
    """What the kills left."""

    kills: int
    valid: int
    interrupted: int  # kills that left a half-made submission next to the whole one


def replace_for_ever(place: SubmissionFolder, sources: list[Path]) -> None:
    """Replace the submission until this process is killed."""
    while True:
        for source in sources:
            place.install(linked(source))


def kill_replacements(kills: int, seed: int) -> Replaced:
    """Kill a replacing process so often; count what is valid after each kill."""
    generator, valid, interrupted = random.Random(seed), 0, 0
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="replacements-") as name:
        folder = Path(name)
        sources = [_adapter(folder / f"rank-{rank}", rank) for rank in SOURCES]
        place = SubmissionFolder(folder / "task" / "repository", MODEL)
        place.prepare()
        place.install(linked(sources[0]))
        for _ in range(kills):
            process = context.Process(target=replace_for_ever, args=(place, sources))
            process.start()
            time.sleep(generator.uniform(SHORTEST_S, LONGEST_S))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            interrupted += len(list(place.path.parent.iterdir())) > 1
            valid += not place.objections() and _rank(place.path) in SOURCES
            place.prepare()
    return Replaced(kills, valid, interrupted)


def _adapter(folder: Path, rank: int) -> Path:
    folder.mkdir()
    write_zeros(folder / "adapter_model.safetensors", {"x.lora_A.weight": (rank, 64)})
    (folder / "adapter_config.json").write_text(json.dumps({**adapter_config("q_proj", "m"), "r": rank}))
    return folder


def _rank(folder: Path) -> int:
    """Return the rank that both files agree on; 0 if they are of different submissions."""
    (shape,) = read_shapes(folder / "adapter_model.safetensors").values()
    said = json.loads((folder / "adapter_config.json").read_text())["r"]
    return shape[0] if shape[0] == said else 0
