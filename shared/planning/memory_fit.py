"""Estimate the bytes that a run needs on one device, and fit the run to its hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from math import ceil

from msgspec import Struct
from msgspec.structs import replace

from shared.errors import PlanError
from shared.messages.hardware import Hardware
from shared.planning.hardware import device_count, is_cpu, usable_memory
from shared.planning.model_shape import Extras, ModelShape, ModulePlan, extras_of
from shared.planning.plan import Plan
from shared.planning.recipe import Recipe

LOGIT_ROWS = 256  # label positions whose logits exist at a time; on a GPU more, as fewer products are faster:
MOST_LOGIT_ROWS = 2048  # 2% of a step at 0.5B (H100), as far as they fit in
LOGIT_SPACE = 3 * 2**28  # bytes
LOGIT_BYTES = 6  # per logit: its fp32 value, and first its 16-bit product, then its 16-bit probability
PROCESS_CPU = 500 * 2**20  # torch, transformers and peft in memory
PROCESS_GPU = 1536 * 2**20  # CUDA context, cuBLAS workspace, NCCL buffers
GRAIN = 64  # tokens; capacities are multiples of it
CPU_CAPACITIES = (1024, 512, 256, 128, 64)
GPU_CAPACITIES = (16384, 8192, 4096, 2048, 1024)
LARGE_CAPACITIES = (65536, 32768)  # taken if they fit on the same rung: fewer, larger kernels
WHOLE = 2**31  # a rank above any break-even: every matrix is dense
LOWER_RANKS = (1024, 512, 256, 128, 64, 32, 16, 8)
# Of each weight of a trained output matrix: its gradient in fp32, a chunk's part in the products' dtype, and
# on a CPU that in fp32 again, before it is added.
HEAD_GRADIENT_BYTES = 10
NO_EXTRAS = Extras()


class Memory(Struct, frozen=True, kw_only=True):
    """Peak bytes on one device, by what they are for."""

    weights: int  # frozen weights and 16-bit working copies
    trainable: int  # fp32 values of what is trained
    gradients: int
    optimizer: int
    activations: int
    logits: int
    process: int  # what the libraries take before the first tensor

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        parts = (self.weights, self.trainable, self.gradients, self.optimizer, self.activations, self.logits)
        return sum(parts) + self.process


class Layout(Struct, frozen=True, kw_only=True):
    """How a run is laid out on its devices: what the memory ladder varies."""

    capacity: int
    parallel: str  # "single", "ddp" or "fsdp2"
    devices: int
    checkpointing: bool
    dtype: str  # "bfloat16" or "float32"
    cpu: bool


def layout_of(plan: Plan, *, cpu: bool) -> Layout:
    """Return how a plan is laid out on its devices."""
    return Layout(
        capacity=plan.capacity,
        parallel=plan.parallel,
        devices=plan.devices,
        checkpointing=plan.activation_checkpointing,
        dtype=plan.dtype,
        cpu=cpu,
    )


def estimate(
    shape: ModelShape,
    modules: Sequence[ModulePlan],
    layout: Layout,
    dropout: float,
    extras: Extras = NO_EXTRAS,
) -> Memory:
    """Peak bytes on one device while training `modules` of a model laid out so, and its extras."""
    width = 2 if layout.dtype == "bfloat16" else 4
    dense = sum(module.parameters for module in modules if module.method == "dense") + extras.parameters
    trained = sum(module.parameters for module in modules) + extras.parameters
    frozen = shape.parameters - dense
    shards = layout.devices if layout.parallel == "fsdp2" else 1
    if layout.parallel == "fsdp2":
        # Two layers are gathered at a time (one computes, one is on its way); the embeddings stay whole. Of
        # what is trained, one layer's gradients are in the weights' dtype, and those of the layer after it,
        # whole, in fp32: they are being reduced.
        layer = (shape.linear_parameters + trained - dense) // shape.layers
        working = (2 * layer + shape.embedding_parameters) * width + (width + 4) * trained // shape.layers
    else:
        # A 16-bit copy of every fp32 weight is kept for the backward pass. DDP's gradients are its buckets.
        working = trained * width if width == 2 else 0
    if extras.embeddings:
        head = HEAD_GRADIENT_BYTES * shape.vocab * shape.hidden
        # Layers that are computed twice don't hold their copies while the head has its gradient.
        working = max(working, head) if layout.checkpointing else working + head
    return Memory(
        weights=frozen * width // shards + working,
        trainable=trained * 4 // shards,
        gradients=trained * 4 // shards,
        optimizer=trained * 8 // shards,  # two fp32 moments
        activations=activation_bytes(shape, modules, layout, dropout, norms=extras.norms),
        logits=min(logit_rows(shape.vocab, cpu=layout.cpu), layout.capacity) * shape.vocab * LOGIT_BYTES,
        process=PROCESS_CPU if layout.cpu else PROCESS_GPU,
    )


def logit_rows(vocabulary: int, *, cpu: bool) -> int:
    """Return how many label positions' logits exist at a time."""
    if cpu:
        return LOGIT_ROWS
    rows = LOGIT_SPACE // (vocabulary * LOGIT_BYTES) // LOGIT_ROWS * LOGIT_ROWS
    return max(LOGIT_ROWS, min(MOST_LOGIT_ROWS, rows))


def activation_bytes(
    shape: ModelShape,
    modules: Sequence[ModulePlan],
    layout: Layout,
    dropout: float,
    *,
    norms: bool = False,
) -> int:
    """Return the bytes kept for a pack's backward pass; checkpointing: a layer's and every layer's input."""
    width = 2 if layout.dtype == "bfloat16" else 4
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Two norms keep their input in fp32 and hand on a copy; attention keeps q, k, v and its output; the MLP
    # gate, up, silu(gate) and their product. A fused kernel never stores the matrix of attention itself.
    layer = 2 * shape.hidden * (4 + width) + (2 * query + 2 * key) * width + 4 * shape.intermediate * width
    layer += max(0, shape.layer_norms - 2) * shape.hidden * 4  # further norms keep their fp32 input
    if shape.head_norms:  # of queries and keys: their weights are frozen, so only the fp32 input is kept
        layer += (query + key) * 4
    if norms:  # trained ones keep what they multiply, too
        layer += shape.layer_norms * shape.hidden * width
        layer += (query + key) * width if shape.head_norms else 0
    # A LoRA module's input is kept already, by what computed it; with dropout the module keeps it masked, and
    # the mask (tests/engine/model/test_activations.py).
    copies = 2 if dropout > 0 else 0
    for module in modules:
        if module.method == "lora":
            layer += (module.rank + copies * module.in_features) * width
    kept = layer + shape.layers * shape.hidden * width if layout.checkpointing else layer * shape.layers
    ends = shape.hidden * (4 + 3 * width)  # embedding output, last norm, gradient of the hidden states
    return layout.capacity * (kept + ends)


class Fit(Struct, frozen=True):
    """The highest rung of the ladder that fits."""

    modules: list[ModulePlan]
    layout: Layout
    memory: Memory
    extras: Extras = NO_EXTRAS


def split(shape: ModelShape, recipe: Recipe, rank: int) -> list[ModulePlan]:
    """LoRA up to the break-even rank in*out/(in+out), above it a dense delta: as free, with fewer weights.

    A lowered rank keeps the recipe's alpha/rank.
    """
    modules = []
    for linear in shape.linears:
        if recipe.targets and linear.name not in recipe.targets:
            continue
        inner, outer = linear.in_features, linear.out_features
        dense = rank * (inner + outer) > inner * outer
        modules.append(
            ModulePlan(
                name=linear.name,
                in_features=inner,
                out_features=outer,
                count=linear.count,
                method="dense" if dense else "lora",
                rank=0 if dense else rank,
                alpha=0.0 if dense else recipe.alpha * rank / recipe.rank,
                parameters=linear.count * (inner * outer if dense else rank * (inner + outer)),
            )
        )
    return modules


def holds_extras(shape: ModelShape, modules: Sequence[ModulePlan], dtype: str) -> bool:
    """Return whether what is submitted has a place for norms and embeddings: a whole model has, no adapter.

    It is one where all matrices are dense, in bf16 (`dense_as_lora`). Of a mixture of experts only the
    attention is trained, and an adapter is a twentieth of the model.
    """
    dense = all(module.method == "dense" for module in modules)
    most = 2 * sum(module.parameters for module in modules) >= shape.linear_parameters
    return dense and most and dtype == "bfloat16"


def with_extras(found: Fit, recipe: Recipe, shape: ModelShape, limit: int, *, head: bool = True) -> Fit:
    """Return the fit with what the recipe trains besides the matrices, as far as there is room for it.

    Sharded embeddings would be gathered, and their gradients with them. Without `head` the output matrix must
    stay as it is, and a tied embedding with it.
    """
    if recipe.targets or not holds_extras(shape, found.modules, found.layout.dtype):
        return found
    wants = recipe.embedding_rate > 0 and head and found.layout.parallel != "fsdp2"
    for embeddings in (True, False) if wants else (False,):
        extras = extras_of(shape, norms=recipe.norm_rate > 0, embeddings=embeddings)
        memory = estimate(shape, found.modules, found.layout, recipe.dropout, extras)
        if memory.total <= limit:
            return Fit(found.modules, found.layout, memory, extras)
    return found


def round_up(tokens: float) -> int:
    """Return the next multiple of GRAIN, at least one."""
    return max(1, ceil(tokens / GRAIN)) * GRAIN


def fit(
    recipe: Recipe,
    shape: ModelShape,
    hardware: Hardware,
    dtype: str,
    longest: int,
    most: float,
    suits: Callable[[Sequence[ModulePlan]], bool] = lambda modules: True,
) -> Fit:
    """Climb down until it fits: DDP, checkpointing, FSDP2, smaller packs, lower rank.

    A model that each device should hold whole is cut over them only if no rank fits otherwise. `longest` is
    the longest row kept (a pack holds at least one row), `most` the tokens of one device's step. Modules that
    don't suit otherwise are taken only if none that suit fit.
    Raises PlanError with the bytes that the last rung still needs.
    """
    limit = usable_memory(hardware)
    floor = round_up(longest)
    cap = max(floor, round_up(most))
    least = None
    rungs = partial(_rungs, recipe, shape, hardware, dtype, floor, cap)
    for modules, layout in chain(rungs(suits=suits), rungs(suits=lambda modules: not suits(modules))):
        memory = estimate(shape, modules, layout, recipe.dropout)
        if memory.total <= limit:
            return _enlarge(Fit(modules, layout, memory), shape, recipe, limit, cap)
        least = memory.total if least is None else min(least, memory.total)
    raise PlanError(
        f"{shape.parameters / 1e9:.2f} billion parameters need at least {(least or 0) / 2**30:.1f} GiB "
        f"on one device, and a run may use {limit / 2**30:.1f} GiB of {hardware.name}"
    )


def _rungs(
    recipe: Recipe,
    shape: ModelShape,
    hardware: Hardware,
    dtype: str,
    floor: int,
    cap: int,
    suits: Callable[[Sequence[ModulePlan]], bool],
) -> Iterator[tuple[list[ModulePlan], Layout]]:
    """Yield all rungs of the ladder that suit, best first."""
    ranks = (*[WHOLE] * recipe.full, recipe.rank, *(rank for rank in LOWER_RANKS if rank < recipe.rank))
    for shards in (False, True) if shape.whole else (True,):
        for rank in ranks:
            modules = split(shape, recipe, rank)
            if not suits(modules):
                continue
            for layout in _layouts(hardware, dtype, floor, cap, shards=shards):
                yield modules, layout


def _layouts(hardware: Hardware, dtype: str, floor: int, cap: int, *, shards: bool) -> Iterator[Layout]:
    """Yield the rungs of one rank, best first: parallel and checkpointing inside, capacity outside."""
    devices, cpu = device_count(hardware), is_cpu(hardware)
    rungs = [("ddp" if devices > 1 else "single", False), ("ddp" if devices > 1 else "single", True)]
    if devices > 1 and shards:
        rungs += [("fsdp2", True)]
    sizes = sorted(
        {min(cap, max(floor, size)) for size in (CPU_CAPACITIES if cpu else GPU_CAPACITIES)}, reverse=True
    )
    for capacity in sizes:
        for parallel, checkpointing in rungs:
            yield Layout(
                capacity=capacity,
                parallel=parallel,
                devices=devices,
                checkpointing=checkpointing,
                dtype=dtype,
                cpu=cpu,
            )


def _enlarge(found: Fit, shape: ModelShape, recipe: Recipe, limit: int, cap: int) -> Fit:
    if found.layout.cpu:
        return found
    for size in LARGE_CAPACITIES:
        layout = replace(found.layout, capacity=min(cap, size))
        memory = estimate(shape, found.modules, layout, recipe.dropout)
        if layout.capacity > found.layout.capacity and memory.total <= limit:
            return Fit(found.modules, layout, memory)
    return found
