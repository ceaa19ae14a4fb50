"""Peak bytes of training steps on a GPU, traced without one: tensors that have sizes and no values.

The engine's own forward and backward pass, clipping and AdamW are run on fake tensors, and every storage is
counted while it lives. Attention is a stand-in that keeps what a fused kernel keeps. Two steps of two packs:
the moments are there in the second one, and the first pack's gradients while the second is computed. Under
DDP and FSDP2 it is rank 0 of four processes (`fake_ranks`), with the engine's own sharding.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec
import torch
from msgspec import Struct
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from bench.gpu.shapes import config_of, random_rows
from bench.performance.fake_ranks import EveryWeightIsUsed, empty_slices, fake_ranks
from bench.performance.storage_counter import StorageCounter
from shared.planning.memory_fit import Layout, Memory, estimate, logit_rows, split
from shared.planning.model_shape import Extras, ModelShape, extras_of
from shared.planning.plan import Plan
from shared.planning.profiles import resolve
from trainer_node.engine.data.packing import Batch, Packs, collate
from trainer_node.engine.distributed.process_group import ProcessGroup
from trainer_node.engine.distributed.sharding import between, spread
from trainer_node.engine.model import adapters, attention, logprobs
from trainer_node.engine.model.label_model import LabelModel
from trainer_node.engine.model.shape import model_shape
from trainer_node.engine.objectives import sft
from trainer_node.engine.train.loop import free_gradients
from trainer_node.engine.train.optimizer import apply_gradients, clip

STEPS, PACKS = 2, 2
DENSE = 2**31  # a rank above any break-even
RANKS = 4  # processes of a run that isn't single


class Case(Struct, frozen=True, kw_only=True):
    """One way to train one model."""

    model: str
    rank: int = DENSE  # of LoRA; a matrix above its break-even is dense
    capacity: int = 16384
    recomputed: bool = False
    dropout: float = 0.0
    layers: int | None = None  # of the model, if not all
    norms: bool = False
    embeddings: bool = False
    parallel: str = "single"  # "ddp" or "fsdp2": one of four processes
    packs: int = PACKS  # that a process adds up for a step

    @property
    def devices(self) -> int:
        """Return how many processes there are."""
        return 1 if self.parallel == "single" else RANKS

    @property
    def name(self) -> str:
        """Return the case in words."""
        parts = [
            self.model,
            "dense" if self.rank == DENSE else f"rank {self.rank}",
            f"{self.capacity} tokens",
        ]
        parts += ["norms"] * self.norms + ["embeddings"] * self.embeddings
        parts += ["recomputed"] if self.recomputed else []
        parts += [f"dropout {self.dropout}"] if self.dropout else []
        parts += [f"{self.parallel} of {RANKS}"] if self.devices > 1 else []
        parts += ["one pack"] if self.packs == 1 else []
        return ", ".join(parts)


CASES = (
    Case(model="smollm2-135m", capacity=32768),
    Case(model="smollm2-135m", rank=128, capacity=8192),
    Case(model="smollm2-135m", rank=16, dropout=0.05),
    Case(model="qwen2.5-0.5b", capacity=32768),
    Case(model="qwen2.5-0.5b", capacity=32768, recomputed=True),
    Case(model="qwen3-0.6b", capacity=32768),
    Case(model="qwen3-0.6b", rank=16),
    Case(model="llama-1b"),
    Case(model="llama-1b", recomputed=True),
    Case(model="llama-1b", rank=1024),  # keys and values dense, the others LoRA
    Case(model="gemma3-1b", rank=128),
    Case(model="gemma3-1b", capacity=4096),
    Case(model="smollm2-135m", norms=True, embeddings=True),
    Case(model="qwen3-0.6b", norms=True, embeddings=True),
    Case(model="llama-1b", capacity=4096, norms=True, embeddings=True),
    Case(model="llama-1b", recomputed=True, norms=True, embeddings=True),
    Case(model="gemma3-1b", capacity=4096, norms=True, embeddings=True),
    Case(model="qwen3-0.6b", capacity=16384, norms=True),
    Case(model="llama-8b", rank=16, capacity=8192),
    Case(model="llama-8b", rank=128, recomputed=True),
    Case(model="llama-8b", capacity=8192, recomputed=True),
    Case(model="llama-1b", parallel="ddp", norms=True, packs=1),
    Case(model="llama-1b", parallel="ddp", norms=True),
    Case(model="llama-1b", parallel="ddp", recomputed=True, norms=True, embeddings=True),
    Case(model="llama-8b", parallel="fsdp2", capacity=8192, recomputed=True, norms=True, packs=1),
    Case(model="llama-8b", parallel="fsdp2", capacity=8192, recomputed=True, norms=True),
    Case(model="llama-8b", parallel="fsdp2", rank=128, capacity=8192, recomputed=True),
    Case(model="qwen3-14b", parallel="fsdp2", capacity=8192, recomputed=True, norms=True),
)


def modules_of(case: Case, shape: ModelShape) -> list[Any]:
    """Return how each kind of matrix is trained."""
    return split(shape, resolve("maximum_accuracy" if case.rank == DENSE else "lora_r16"), case.rank)


def estimated(case: Case) -> Memory:
    """Return the planner's estimate for each GPU."""
    shape = model_shape(config_of(case.model, dry=False, layers=case.layers))
    layout = Layout(
        capacity=case.capacity,
        parallel=case.parallel,
        devices=case.devices,
        checkpointing=case.recomputed,
        dtype="bfloat16",
        cpu=False,
    )
    return estimate(shape, modules_of(case, shape), layout, case.dropout, extras_in(case, shape))


def extras_in(case: Case, shape: ModelShape) -> Extras:
    """Return what the case trains besides the matrices of the layers."""
    return extras_of(shape, norms=case.norms, embeddings=case.embeddings)


class _KeptAttention(torch.autograd.Function):  # type: ignore[misc]
    """Attention's sizes: what a fused kernel keeps for the backward pass, and what that makes."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, sums = ctx.saved_tensors
        torch.empty_like(sums)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Any, None]:
    # As the engine hands them to a kernel: views of [T, H, D].
    q, k, v = (tensor.to(value.dtype)[0].transpose(0, 1) for tensor in (query, key, value))
    return _KeptAttention.apply(q, k, v).unsqueeze(0), None


def _install_attention(model: LabelModel) -> None:
    attention.install(model.base)
    AttentionInterface.register(attention.NAME, _attention)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Take a model's batching for granted, and as many rows of logits as on a GPU."""

    def unchecked(network: Any, *, bf16: bool) -> LabelModel:
        model = LabelModel(network, bf16)
        _install_attention(model)
        return model

    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (adapters, "label_model", unchecked),
        (logprobs, "logit_rows", lambda vocabulary, *, cpu: logit_rows(vocabulary, cpu=False)),
        # PEFT moves factors that are where they should be, which fake parameters can't.
        (BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *_, **__: None),
        (torch.nn.Module, "to", lambda module, *_, **__: module),
    )
    with ExitStack() as stack:
        for place, name, stand_in in stand_ins:
            stack.enter_context(patch.object(place, name, stand_in))
        yield


def traced_peak(case: Case, plan: Plan) -> int:
    """Return the most bytes that were alive in two steps."""
    config = config_of(case.model, dry=False, layers=case.layers)
    plan = replace_plan(plan, case, model_shape(config))
    rows = random_rows(case.packs * case.capacity, config.vocab_size, dry=False)
    packs = Packs(rows.lengths.tolist(), case.capacity, 0, 10**6).take(case.packs)
    batches = [collate(rows, pack, case.capacity, "cpu") for pack in packs]
    counter, fake = StorageCounter(), FakeTensorMode(allow_non_fake_inputs=True)
    with _as_on_a_gpu(), fake_ranks(case.devices, counter), fake, counter, EveryWeightIsUsed():
        deltas, forward = _model(config, plan)
        optimizer = torch.optim.AdamW(deltas.param_groups(plan), fused=True)
        gc.collect()
        counter.peak = counter.present  # what made the model is not part of the steps
        for _ in range(STEPS):
            for turn, batch in enumerate(_fake(fake, one) for one in batches):
                with between(forward, last=turn == len(batches) - 1):
                    (sft.loss(forward, batch) / len(rows)).backward()
            norm = clip(deltas.parameters, plan.clip)
            apply_gradients(optimizer, skip=torch.zeros((), dtype=torch.bool) & norm.isfinite())
            state: Any = SimpleNamespace(forward=forward, optimizer=optimizer)
            free_gradients(state)
    return counter.peak


def _model(config: PretrainedConfig, plan: Plan) -> tuple[adapters.Deltas, nn.Module]:
    """Return a model as one of the plan's processes holds it, and what gives its gradients."""
    sharded = plan.parallel == "fsdp2"
    with torch.device("meta") if sharded else nullcontext():
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    deltas = adapters.add_deltas(network, plan, 0)
    slices = empty_slices(deltas) if sharded else None
    _install_attention(deltas.model)
    deltas, forward = spread(deltas, plan, ProcessGroup(0, plan.devices), slices=slices)
    deltas.model.train()
    return deltas, forward


def _fake(mode: FakeTensorMode, batch: Batch) -> Batch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    moved = {name: mode.from_tensor(one) for name, one in values.items() if isinstance(one, Tensor)}
    return replace(batch, **moved)


def replace_plan(plan: Plan, case: Case, shape: ModelShape) -> Plan:
    """Return the plan as the case asks for."""
    return msgspec.structs.replace(
        plan,
        modules=modules_of(case, shape),
        capacity=case.capacity,
        activation_checkpointing=case.recomputed,
        dropout=case.dropout,
        dtype="bfloat16",
        packs_per_step=case.packs * case.devices,
        parallel=case.parallel,
        devices=case.devices,
        extras=extras_in(case, shape),
    )
