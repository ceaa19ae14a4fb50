"""One run of the arena in a process of its own: the engine's worker, then its submission's test losses.

python -m bench.arena.contestant FOLDER/job.json

FOLDER has train.json and test.json; test_losses.json is written next to them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from msgspec.structs import replace

from bench.gpu import older_torch
from shared.messages import FileFormat, decode_worker_job
from shared.planning.profiles import PROFILES
from trainer_node.engine import pipeline
from trainer_node.engine.data.examples import Examples, read_rows, scored_length, tokenize
from trainer_node.engine.evaluate import metric
from trainer_node.engine.model.adapters import load_adapter
from trainer_node.engine.model.loading import load_config, load_model, load_tokenizer
from trainer_node.engine.signals import Stop

AUTO_ONCE = "auto_once"  # the plan of `auto`, carried out once without a search
AUTO_UNREPAIRED = "auto_unrepaired"  # `auto` on the base model as it is given
AUTO_MATRICES = "auto_matrices"  # `auto` without norms, embeddings and output matrix


def test_losses(job_path: Path) -> list[float]:
    """Return the submission's loss on every test row, as the scorer takes it, in fp32."""
    job, folder = decode_worker_job(job_path.read_bytes()), job_path.parent
    export = folder / "export"
    adapter = (export / "adapter_config.json").is_file()
    network: torch.nn.Module = load_model(job.model_path if adapter else str(export), torch.float32)
    if adapter:
        network = load_adapter(network, str(export))
    network = network.to("cpu" if job.hardware.device == "cpu" else "cuda")
    losses: list[float] = metric.score(network, test_rows(job_path)).per_example.tolist()
    return losses


def test_rows(job_path: Path) -> Examples:
    """Return the test rows, as the scorer tokenises them."""
    job = decode_worker_job(job_path.read_bytes())
    rows = read_rows(str(job_path.parent / "test.json"), FileFormat.JSON, allow_private_urls=False).rows
    length = scored_length(load_config(job.model_path))
    tokenizer = load_tokenizer(job.model_path)
    return tokenize(rows, job.task_type, job.dataset_type, tokenizer, length)[0]


def main() -> int:
    """Run the job, score what it submits; the worker's exit status."""
    job_path = Path(sys.argv[1])
    torch.set_num_threads(1)
    older_torch.patch()
    PROFILES[AUTO_UNREPAIRED] = replace(PROFILES["auto"], profile=AUTO_UNREPAIRED, repairs=False)
    PROFILES[AUTO_MATRICES] = replace(
        PROFILES["auto"], profile=AUTO_MATRICES, norm_rate=0.0, embedding_rate=0.0
    )
    PROFILES[AUTO_ONCE] = replace(PROFILES["auto"], profile=AUTO_ONCE, arms=())
    status = pipeline.main(job_path, Stop())
    if status == 0:
        (job_path.parent / "test_losses.json").write_text(json.dumps(test_losses(job_path)))
    return status


if __name__ == "__main__":
    sys.exit(main())
