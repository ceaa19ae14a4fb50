"""One run of the arena in a process of its own: the engine's worker, then its submission's test losses.

python -m bench.arena.contestant FOLDER/job.json

FOLDER has train.json and test.json; test_losses.json is written next to them, and base_losses.json for
other kinds than instruct. A job of several processes starts them, as the engine does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from msgspec.structs import replace

from bench.arena.arena import AUTO_ON_FOUR, CLOCK_RATE
from bench.arena.kinds.losses import losses_of, with_base
from bench.arena.prices.priced_clock import PricedClock, install
from bench.arena.prices.prices import PRICES
from bench.gpu import older_torch
from shared.messages.offers import FileFormat, TaskType
from shared.messages.runs import WorkerJob, decode_worker_job
from shared.planning.profiles import PROFILES
from trainer_node.engine import pipeline
from trainer_node.engine.data.examples import Examples, longest_row, read_rows, tokenize
from trainer_node.engine.distributed import launch
from trainer_node.engine.evaluate import metric
from trainer_node.engine.model.adapters import load_adapter
from trainer_node.engine.model.loading import load_config, load_model, load_tokenizer
from trainer_node.engine.search.strategy import probes
from trainer_node.engine.signals import Stop

AUTO_ONCE = "auto_once"  # the plan of `auto`, carried out once without a search
AUTO_UNREPAIRED = "auto_unrepaired"  # `auto` on the base model as it is given
AUTO_MATRICES = "auto_matrices"  # `auto` without norms, embeddings and output matrix
# `auto` with one probe of so much of the time, however few its steps: for jobs that it trains once otherwise.
PROBE_SHARES = {"auto_probe_4": 0.04, "auto_probe_12": 0.12, "auto_probe_20": 0.2}


def test_losses(job_path: Path) -> list[float]:
    """Return the submission's loss on every test row, as the scorer takes it, in fp32."""
    job, folder = decode_worker_job(job_path.read_bytes()), job_path.parent
    export = folder / "export"
    adapter = (export / "adapter_config.json").is_file()
    network: torch.nn.Module = load_model(job.model_path if adapter else str(export), torch.float32)
    if adapter:
        network = load_adapter(network, str(export))
    network, rows = network.to(device_of(job)), test_rows(job_path)
    if is_plain(job):
        scored = metric.score(network, rows).per_example
    else:
        base = load_model(job.model_path, torch.float32).to(device_of(job))
        rows = with_base(base, rows)
        scored, before = (losses_of(one, base, rows, job.kl_coefficient) for one in (network, base))
        (folder / "base_losses.json").write_text(json.dumps(before.tolist()))
    losses: list[float] = scored.tolist()
    return losses


def is_plain(job: WorkerJob) -> bool:
    """Return whether the score is the loss on single answers, and nothing of the base model is in it."""
    return job.task_type is TaskType.INSTRUCT and not job.kl_coefficient


def device_of(job: WorkerJob) -> str:
    """Return the device that the job's models are scored on."""
    return "cpu" if job.hardware.device == "cpu" else "cuda"


def test_rows(job_path: Path) -> Examples:
    """Return the test rows, as the scorer tokenises them."""
    job = decode_worker_job(job_path.read_bytes())
    rows = read_rows(str(job_path.parent / "test.json"), FileFormat.JSON, allow_private_urls=False).rows
    length = longest_row(load_config(job.model_path), job.task_type, job.scorer)
    tokenizer = load_tokenizer(job.model_path)
    return tokenize(rows, job.task_type, job.dataset_type, tokenizer, length, scorer=job.scorer)[0]


def add_profiles() -> None:
    """Make the variants of `auto` known to the engine."""
    auto = PROFILES["auto"]
    PROFILES[AUTO_UNREPAIRED] = replace(auto, profile=AUTO_UNREPAIRED, repairs=False)
    PROFILES[AUTO_MATRICES] = replace(auto, profile=AUTO_MATRICES, norm_rate=0.0, embedding_rate=0.0)
    PROFILES[AUTO_ONCE] = replace(auto, profile=AUTO_ONCE, arms=())
    PROFILES[AUTO_ON_FOUR] = replace(auto, profile=AUTO_ON_FOUR)
    for name in PROBE_SHARES:
        PROFILES[name] = replace(auto, profile=name)


def train(job_path: Path) -> int:
    """Run the job, in as many processes as it says; the exit status."""
    world = launch.world_of(job_path)
    if world == 1 or launch.rank_of(os.environ) is not None:
        launch.die_with_parent()
        return pipeline.main(job_path, Stop())
    command = [sys.executable, "-m", "bench.arena.contestant", str(job_path)]
    return launch.Ranks(command, world).run()


def main() -> int:
    """Run the job, score what it submits; the worker's exit status."""
    job_path = Path(sys.argv[1])
    torch.set_num_threads(1)
    older_torch.patch()
    add_profiles()
    profile = decode_worker_job(job_path.read_bytes()).profile
    if profile in PROBE_SHARES:
        probes.PROBE_SHARE, probes.PROBE_TRIALS, probes.PROBE_STEPS = PROBE_SHARES[profile], 1, 1
    prices = job_path.parent / "prices"
    if prices.exists():
        install(PricedClock(PRICES[prices.read_text()], CLOCK_RATE))
    status = train(job_path)
    if status == 0 and launch.rank_of(os.environ) is None:
        (job_path.parent / "test_losses.json").write_text(json.dumps(test_losses(job_path)))
    return status


if __name__ == "__main__":
    sys.exit(main())
