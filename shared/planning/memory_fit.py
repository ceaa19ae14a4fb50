"""Bytes that a run needs on one device, part by part."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from shared.planning.model_shape import ModelShape, ModulePlan

LOGIT_ROWS = 256  # label positions whose logits exist at a time
LOGIT_BYTES = 8  # per logit: its 16-bit product, its fp32 value, its 16-bit probability
PROCESS_CPU = 500 * 2**20  # torch, transformers and peft in memory
PROCESS_GPU = 1536 * 2**20  # CUDA context, cuBLAS workspace, NCCL buffers
DDP_BUCKETS = 2 * 200 * 2**20  # two buckets in flight


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
        """All parts together."""
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


def estimate(shape: ModelShape, modules: Sequence[ModulePlan], layout: Layout, dropout: float) -> Memory:
    """Peak bytes on one device while training `modules` of a model laid out so."""
    width = 2 if layout.dtype == "bfloat16" else 4
    dense = sum(module.parameters for module in modules if module.method == "dense")
    trained = sum(module.parameters for module in modules)
    frozen = shape.parameters - dense
    shards = layout.devices if layout.parallel == "fsdp2" else 1
    if layout.parallel == "fsdp2":
        # Two layers are gathered at a time (one computes, one is on its way); the embeddings stay whole.
        layer = (shape.linear_parameters + trained - dense) // shape.layers
        working = 2 * layer * width + shape.embedding_parameters * width + 2 * layer * 4
    else:
        # Autocast holds a 16-bit copy of every fp32 weight that it has met.
        working = trained * width if width == 2 else 0
        working += DDP_BUCKETS if layout.parallel == "ddp" else 0
    return Memory(
        weights=frozen * width // shards + working,
        trainable=trained * 4 // shards,
        gradients=trained * 4 // shards,
        optimizer=trained * 8 // shards,  # two fp32 moments
        activations=activation_bytes(shape, modules, layout, dropout),
        logits=min(LOGIT_ROWS, layout.capacity) * shape.vocab * LOGIT_BYTES,
        process=PROCESS_CPU if layout.cpu else PROCESS_GPU,
    )


def activation_bytes(shape: ModelShape, modules: Sequence[ModulePlan], layout: Layout, dropout: float) -> int:
    """Bytes kept for one pack's backward pass; with checkpointing one layer's plus every layer's input."""
    width = 2 if layout.dtype == "bfloat16" else 4
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Two norms keep their input in fp32 and hand on a copy; attention keeps q, k, v and its output; the MLP
    # gate, up, silu(gate) and their product. A fused kernel never stores the matrix of attention itself.
    layer = 2 * shape.hidden * (4 + width) + (2 * query + 2 * key) * width + 4 * shape.intermediate * width
    layer += 2 * shape.hidden * width  # the two residual sums
    # Each LoRA module holds a copy of its input, and with dropout a masked one (see
    # bench/performance/memory.py).
    copies = 2 if dropout > 0 else 1
    for module in modules:
        if module.method == "lora":
            layer += (module.rank + copies * module.in_features) * width
    kept = layer + shape.layers * shape.hidden * width if layout.checkpointing else layer * shape.layers
    ends = shape.hidden * (4 + 3 * width)  # embedding output, last norm, gradient of the hidden states
    return layout.capacity * (kept + ends)
