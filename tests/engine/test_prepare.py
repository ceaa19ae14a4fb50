"""What a run finds out about its machine before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import Gemma2Config, GptOssConfig, LlamaConfig

from bench.performance.memory import plan_of
from shared.clock import TokenClock, WallClock
from shared.errors import DataUnavailableError
from shared.messages.hardware import Hardware
from shared.planning.memory_fit import split
from shared.planning.plan import Plan, Repair
from shared.planning.profiles import resolve
from shared.planning.throughput import SAVE_BYTES_PER_S, Measured
from tests.engine.train.conftest import JOB
from trainer_node.engine import limits, prepare
from trainer_node.engine.context import JobData, RunContext
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.held_out import alike, hold_out
from trainer_node.engine.data.token_cache import TokenCache
from trainer_node.engine.distributed.process_group import CPU, SINGLE_PROCESS, ProcessGroup
from trainer_node.engine.model import attention
from trainer_node.engine.model.attention import PER_DOCUMENT, Chosen, _dense
from trainer_node.engine.model.shape import model_shape
from trainer_node.engine.reporter import Reporter
from trainer_node.engine.safetensors_file import write_tensors
from trainer_node.engine.signals import Stop

GIB = 2**30
SIZES = "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"
CONFIG_135M = dict(zip((*SIZES, "vocab_size"), (576, 30, 1536, 9, 3, 49152), strict=True))


@pytest.mark.parametrize(
    ("free", "planned"),
    [
        (78.6, 80),  # what a context and the driver leave
        (76.1, 80),
        (40.0, 40),  # another process's memory, or a slice of the GPU
    ],
)
def test_the_plan_is_made_for_the_memory_that_is_free(
    free: float, planned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), 80 * GIB))
    hardware = Hardware(device="H100", count=1, memory_bytes=80 * GIB)
    job, said = replace(JOB, hardware=hardware), list[str]()
    group = ProcessGroup(device=torch.device("cuda", 0))
    found = prepare.with_free_memory(job, group, said.append)
    assert found.hardware.memory_bytes == planned * GIB
    assert said == [] or said == ["only 40.0 of 80.0 GiB of a GPU are free: the plan is made for that"]
    assert bool(said) == (planned < 80)


def test_a_cpu_has_the_memory_that_its_half_states() -> None:
    assert prepare.with_free_memory(JOB, SINGLE_PROCESS, pytest.fail) is JOB


@pytest.mark.parametrize(("share", "most"), [(0.5, 500), (1.0, 1000)])
def test_data_may_take_the_memory_of_its_slot(
    share: float, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def limit(more: int) -> AbstractContextManager[None]:
        taken.append(more)
        raise MemoryError

    monkeypatch.setattr(prepare, "machine_memory", lambda: (1000, 1000))
    monkeypatch.setattr(limits, "memory_limit", limit)
    reporter = Reporter(tmp_path / "progress.jsonl", "t", "a")
    run = RunContext(replace(JOB, memory_share=share), tmp_path, WallClock(), reporter, Stop())
    with pytest.raises(DataUnavailableError, match="needs more than"):
        prepare.bounded_tokens(run, 100)
    assert taken == [most]


@pytest.mark.parametrize("near", [True, False])
def test_a_run_that_began_before_near_duplicates_were_known_goes_on_with_its_rows(
    near: bool, tmp_path: Path, make_examples: Callable[..., Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = make_examples([80] * 100).take([*range(100), *range(50)])
    for row in range(100, 150):
        place = examples.offsets[row] + 60
        examples.ids[place] = examples.labels[place] = 1
    began = hold_out(examples, JOB.seed, alike(examples, near=near))[0].fingerprint()
    monkeypatch.setattr(prepare, "kept", lambda folder: TokenCache(examples, {}, 150))
    run = RunContext(JOB, tmp_path, WallClock(), Reporter(tmp_path / "progress.jsonl", "t", "a"), Stop())
    data = prepare.reload_data(run, LlamaConfig(vocab_size=1000), began)
    assert isinstance(data, JobData)
    assert data.train.fingerprint() == began
    assert data.copies == (50 if near else 0)

    held = iter([None, TokenCache(examples, {}, 150)])  # reading the data again keeps its tokens
    monkeypatch.setattr(prepare, "kept", lambda folder: next(held))
    read = prepare.divided(JOB, TokenCache(examples, {}, 150), 1000, 1000)
    monkeypatch.setattr(prepare, "ingest", lambda run, config: read)
    again = prepare.reload_data(run, LlamaConfig(vocab_size=1000), began)
    assert isinstance(again, JobData)
    assert again.train.fingerprint() == began


def _plan_of(config: LlamaConfig, parallel: str = "single", **changes: Any) -> Plan:
    shape = model_shape(config)
    modules = split(shape, resolve("maximum_accuracy"), 2**31)
    plan = plan_of("smollm2-135m", "dense")
    return replace(plan, modules=modules, capacity=8192, parallel=parallel, **changes)


def _data(rows: Examples) -> JobData:
    return JobData(rows, rows, {}, 4096)


@pytest.mark.parametrize(
    ("sizes", "low", "high"),
    [
        (tuple(CONFIG_135M.values()), 1.6, 3.5),  # 135M: 2.7 times as fast was measured
        ((4096, 2, 14336, 32, 8, 128256), 1.0, 1.0),  # wide layers keep a GPU busy
    ],
)
def test_a_small_model_is_expected_to_train_faster_than_its_forward_passes_say(
    sizes: tuple[int, ...], low: float, high: float, make_examples: Callable[..., Examples]
) -> None:
    config = LlamaConfig(**dict(zip(CONFIG_135M, sizes, strict=True)))
    hardware = Hardware(device="H100", count=1, memory_bytes=80 * GIB)
    data = _data(make_examples([300] * 20))
    assert low <= prepare.recorded_gain(config, _plan_of(config), data, hardware, CPU) <= high
    for pairs, divergence in ((True, False), (False, True)):
        rows = _data(make_examples([300] * 20, group=2 if pairs else 1))
        assert (
            prepare.recorded_gain(config, _plan_of(config), rows, hardware, CPU, divergence=divergence) == 1.0
        )
    cpu = Hardware(device="cpu", count=2, memory_bytes=80 * GIB)
    for plan, where in ((_plan_of(config), cpu), (_plan_of(config, "ddp"), hardware)):
        assert prepare.recorded_gain(config, plan, data, where, CPU) == 1.0


@pytest.mark.parametrize("cause", ["soft cap", "sinks", "no kernel"])
def test_no_gain_is_expected_of_passes_that_can_not_be_recorded(
    cause: str, make_examples: Callable[..., Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware = Hardware(device="H100", count=1, memory_bytes=80 * GIB)
    config, data = LlamaConfig(**CONFIG_135M), _data(make_examples([300] * 20))
    plan = _plan_of(config)
    assert prepare.recorded_gain(config, plan, data, hardware, CPU) > 1.0
    if cause == "soft cap":
        config = Gemma2Config(**CONFIG_135M, head_dim=64)
    elif cause == "sinks":
        config = GptOssConfig(**CONFIG_135M, head_dim=64, num_local_experts=1, num_experts_per_tok=1)
    else:
        slow = [Chosen(PER_DOCUMENT, _dense())]
        monkeypatch.setattr(attention, "choose_kernels", lambda config, device: slow)
    assert prepare.recorded_gain(config, plan, data, hardware, CPU) == 1.0


def test_the_disk_is_measured_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Reporter(tmp_path / "progress.jsonl", "t", "a")
    run = RunContext(JOB, tmp_path, WallClock(), reporter, Stop())
    plan = plan_of("smollm2-135m", "LoRA 16")
    sizes: list[int] = []
    real = write_tensors

    def slow(path: Path, tensors: dict[str, torch.Tensor]) -> Any:
        sizes.append(tensors["bytes"].numel())
        time.sleep(0.2)
        return real(path, tensors)

    monkeypatch.setattr(prepare, "write_tensors", slow)
    assert 0 < prepare.save_rate(run, plan) < sizes[0] / 0.2
    assert not list(tmp_path.glob(".disk*"))
    assert prepare.LEAST_TRIED <= sizes[0] <= prepare.MOST_TRIED

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_tensors", full)
    assert prepare.save_rate(run, plan) == SAVE_BYTES_PER_S
    assert prepare.save_rate(replace_clock(run), plan) == SAVE_BYTES_PER_S


@pytest.mark.parametrize("frozen", ["lm_head.weight", "layers.0.self_attn.q_proj.weight"])
def test_restored_weights_that_an_adapter_lacks_are_part_of_the_export(frozen: str, tmp_path: Path) -> None:
    size = 270e6  # of the model in 16 bits
    config = LlamaConfig(**CONFIG_135M, tie_word_embeddings=True)
    run = RunContext(JOB, tmp_path, WallClock(), Reporter(tmp_path / "progress.jsonl", "t", "a"), Stop())
    closing = Measured(load_s=1.0, score_s=1.0, save_bytes_per_s=1e6)
    plan = plan_of("smollm2-135m", "LoRA 16")
    adapter = prepare.first_costs(run, config, plan, closing, 0.0)
    assert adapter.export_s < 0.2 * 2 * size / 1e6
    restored = prepare.first_costs(run, config, replace(plan, repair=Repair(1.2, [frozen])), closing, 0.0)
    assert restored.export_s == pytest.approx(2 * size / 1e6, rel=0.01)


def replace_clock(run: RunContext) -> RunContext:
    """The run, counted in tokens: then nothing takes time."""
    return RunContext(run.job, run.folder, TokenClock(0.0, 100.0), run.reporter, run.stop)
