"""The files of an entry that are not code of the engine. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

DOCKERFILES: Final = (
    "ops/docker/standalone-text-trainer.dockerfile",
    "dockerfiles/standalone-text-trainer.dockerfile",  # where validators looked earlier
)
ENTRYPOINT: Final = 'ENTRYPOINT ["python", "-m", "trainer_node.contest"]'
FLASH: Final = "flash-attn-4==4.0.0b36"
IGNORED: Final = "__pycache__/\n*.pyc\n"


def dockerfile(profiles: Sequence[str], torch_args: str, base_image: str) -> str:
    """Return the image of a text trainer. Validators pass no build arguments, so nothing is left open."""
    torch = " ".join(
        part for part in ("pip install --no-cache-dir", torch_args, "$(head -1 requirements.txt)") if part
    )
    return f"""# A text trainer for one contest task: {ENTRYPOINT.removeprefix("ENTRYPOINT ")}
# Runs as root: the volume that submissions go to is root's, and the container has no capabilities.
FROM {base_image}

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/podium \\
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \\
    PODIUM_CONTEST_PROFILES="{" ".join(profiles)}"
WORKDIR /podium

# A C compiler: torch.compile makes calls one when it runs.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \\
    && rm -rf /var/lib/apt/lists/*

COPY requirements.txt ./
RUN {torch}
RUN pip install --no-cache-dir --requirement requirements.txt
# Attention kernels: faster on GPUs, and the same numbers without them.
RUN pip install --no-cache-dir --constraint requirements.txt {FLASH} \\
    || echo "no attention kernels: training is slower"

COPY shared shared
COPY trainer_node trainer_node
RUN python -c "import trainer_node.contest.__main__, trainer_node.engine.pipeline"

{ENTRYPOINT}
"""


def readme(version: str, profiles: Sequence[str]) -> str:
    """Return the README of an entry."""
    return f"""# Text trainer

Fine-tunes a causal language model on one task under a deadline: instruct, chat, completion, preferences.
Made from Podium {version} by `podium entry build`.

- `ops/docker/standalone-text-trainer.dockerfile` builds the image; `dockerfiles/` has a copy for older
  validators.
- `trainer_node/contest/` runs inside the container: it reads the task, supervises the training process, and
  replaces the submission by better ones, each by one exchange of folders. A valid one is in place within
  seconds.
- `trainer_node/engine/` trains: profiles {", ".join(profiles)}, the first that can be carried out.
- `requirements.txt` pins every package. No weights, no data and no packed files are part of this repository;
  nothing is downloaded when the container runs.
"""
