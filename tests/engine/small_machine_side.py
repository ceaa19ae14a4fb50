"""A worker of test_limits: it takes its machine for a small one. In a process of its own, as that may end."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer_node.engine import pipeline, prepare
from trainer_node.engine.__main__ import leave
from trainer_node.engine.signals import Stop


def main() -> int:
    """`small_machine_side.py JOB BYTES`."""
    size = int(sys.argv[2])
    setattr(prepare, "machine_memory", lambda: (size, size))  # noqa: B010
    return pipeline.main(Path(sys.argv[1]), Stop())


if __name__ == "__main__":
    leave(main())
