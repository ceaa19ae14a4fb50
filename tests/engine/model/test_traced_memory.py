"""The planner's memory estimate against peaks of the engine's own steps, traced without a GPU.

`python -m bench memory` has 28 cases of whole models; here are those that are quick, and small models whose
peak can be computed by hand.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bench.performance.fake_ranks import fake_ranks
from bench.performance.memory import LEAST, MOST, plan_of
from bench.performance.storage_counter import StorageCounter
from bench.performance.traced_memory import CASES, Case, estimated, traced_peak

SMALL = 2**18  # bytes: activations of eight rows


@pytest.mark.parametrize(
    "case",
    [
        Case(model="qwen3-0.6b", layers=3, capacity=16384),  # queries and keys are normed
        Case(model="llama-1b", layers=3, rank=16, capacity=16384),  # LoRA, nothing is recomputed
        Case(model="llama-1b", recomputed=True),  # of a few layers the head's chunk would be most
        Case(model="smollm2-135m", rank=16, dropout=0.05),  # a chunk of logits was counted too large
        Case(model="llama-1b", layers=2, capacity=4096, parallel="ddp"),
        Case(model="llama-1b", layers=2, capacity=4096, parallel="ddp", packs=1),
        Case(model="llama-8b", layers=3, capacity=8192, recomputed=True, norms=True, parallel="fsdp2"),
        Case(model="llama-8b", layers=3, capacity=8192, recomputed=True, rank=128, parallel="fsdp2"),
    ],
    ids=lambda case: case.name,
)
def test_the_estimate_is_near_the_traced_peak(case: Case) -> None:
    memory = estimated(case)
    peak = traced_peak(case, plan_of("smollm2-135m", "LoRA 16"))
    assert LEAST <= (memory.total - memory.process) / peak - 1 <= MOST


def test_the_bench_has_as_many_cases_as_the_docs_say() -> None:
    assert len(CASES) == 28
    assert {case.parallel for case in CASES} == {"single", "ddp", "fsdp2"}


def test_what_fsdp_gathers_and_reduces_is_counted() -> None:
    """Two matrices of W weights over four processes: 11 W bytes at most.

    In the first matrix's backward pass there are both shards in fp32 (2 W), the second one's gradient (W) and
    the whole of it that was reduced (4 W), and of the first the gathered weights in bf16 (2 W) and either
    what they were gathered into or their gradient (2 W).
    """
    weights, counter = 1024 * 1024, StorageCounter()
    with fake_ranks(4, counter) as mesh, FakeTensorMode(allow_non_fake_inputs=True), counter:
        model = two_matrices(1024, mesh)
        for _ in range(2):
            model(torch.randn(8, 1024)).sum().backward()
            model.zero_grad(set_to_none=True)
        assert 11 * weights <= counter.peak <= 11 * weights + SMALL
        assert 2 * weights <= counter.present <= 2 * weights + SMALL  # the rest is freed again


def two_matrices(size: int, mesh: DeviceMesh | None) -> nn.Module:
    """Return a model of two layers, cut as the engine cuts one."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = [nn.Linear(size, size, bias=False) for _ in range(2)]
    return fully_shard(
        nn.Sequential(*(fully_shard(layer, mesh=mesh, mp_policy=policy) for layer in layers)),
        mesh=mesh,
        mp_policy=policy,
    )
