"""Peak bytes of training steps on a GPU, traced without one: tensors that have sizes and no values.

The engine's own forward and backward pass, clipping and AdamW are run on fake tensors, and every storage is
counted while it lives. Attention is a stand-in that keeps what a fused kernel keeps. Two steps of two packs:
the moments are there in the second one, and the first pack's gradients while the second is computed.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import msgspec
import torch
from msgspec import Struct
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM

from bench.gpu.shapes import config_of, random_rows
from shared.planning.memory_fit import Layout, Memory, estimate, logit_rows, split
from shared.planning.model_shape import Extras, ModelShape, extras_of
from shared.planning.plan import Plan
from shared.planning.profiles import resolve
from trainer_node.engine.data.packing import Batch, Packs, collate
from trainer_node.engine.model import adapters, attention, logprobs
from trainer_node.engine.model.label_model import LabelModel
from trainer_node.engine.model.shape import model_shape
from trainer_node.engine.objectives import sft
from trainer_node.engine.train.optimizer import apply_gradients, clip

STEPS, PACKS = 2, 2
DENSE = 2**31  # a rank above any break-even
GPU_ALIGNMENT = 512  # bytes: what CUDA's allocator rounds up to


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
)


def modules_of(case: Case, shape: ModelShape) -> list[Any]:
    """Return how each kind of matrix is trained."""
    return split(shape, resolve("maximum_accuracy" if case.rank == DENSE else "lora_r16"), case.rank)


def estimated(case: Case) -> Memory:
    """Return the planner's estimate for one GPU."""
    shape = model_shape(config_of(case.model, dry=False, layers=case.layers))
    layout = Layout(
        capacity=case.capacity,
        parallel="single",
        devices=1,
        checkpointing=case.recomputed,
        dtype="bfloat16",
        cpu=False,
    )
    return estimate(shape, modules_of(case, shape), layout, case.dropout, extras_in(case, shape))


def extras_in(case: Case, shape: ModelShape) -> Extras:
    """Return what the case trains besides the matrices of the layers."""
    return extras_of(shape, norms=case.norms, embeddings=case.embeddings)


class StorageCounter(TorchDispatchMode):  # type: ignore[misc]
    """Counts the bytes of all storages that are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.present = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self.count(one)
        return found

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // GPU_ALIGNMENT) * GPU_ALIGNMENT
        self._alive[key] = size
        self.present += size
        self.peak = max(self.peak, self.present)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.present -= self._alive.pop(key)


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


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Take a model's batching for granted, and as many rows of logits as on a GPU."""

    def unchecked(network: Any, *, bf16: bool) -> LabelModel:
        attention.install(network.get_base_model() if hasattr(network, "get_base_model") else network)
        AttentionInterface.register(attention.NAME, _attention)
        return LabelModel(network, bf16)

    stand_ins: tuple[tuple[Any, str, Any], ...] = (
        (adapters, "label_model", unchecked),
        (logprobs, "logit_rows", lambda vocabulary, *, cpu: logit_rows(vocabulary, cpu=False)),
        # PEFT moves factors that are where they should be, which fake parameters can't.
        (BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *_, **__: None),
        (torch.nn.Module, "to", lambda module, *_, **__: module),
    )
    before = [(place, name, getattr(place, name)) for place, name, _ in stand_ins]
    for place, name, stand_in in stand_ins:
        setattr(place, name, stand_in)
    try:
        yield
    finally:
        for place, name, real in before:
            setattr(place, name, real)


def traced_peak(case: Case, plan: Plan) -> int:
    """Return the most bytes that were alive in two steps."""
    config = config_of(case.model, dry=False, layers=case.layers)
    plan = replace_plan(plan, case, model_shape(config))
    rows = random_rows(PACKS * case.capacity, config.vocab_size, dry=False)
    packs = Packs(rows.lengths.tolist(), case.capacity, 0, 10**6).take(PACKS)
    batches = [collate(rows, pack, case.capacity, "cpu") for pack in packs]
    counter = StorageCounter()
    with _as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True) as fake, counter:
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        deltas = adapters.add_deltas(network, plan, 0)
        deltas.model.train()
        optimizer = torch.optim.AdamW(deltas.param_groups(plan), fused=True)
        gc.collect()
        counter.peak = counter.present  # what made the model is not part of the steps
        for _ in range(STEPS):
            for batch in (_fake(fake, one) for one in batches):
                (sft.loss(deltas.model, batch) / len(rows)).backward()
            norm = clip(deltas.parameters, plan.clip)
            apply_gradients(optimizer, skip=torch.zeros((), dtype=torch.bool) & norm.isfinite())
            optimizer.zero_grad(set_to_none=True)
    return counter.peak


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
        packs_per_step=PACKS,
        extras=extras_in(case, shape),
    )
