import pytest
from msgspec.structs import replace

from shared.planning.memory_fit import Layout, Memory, activation_bytes, estimate, split
from shared.planning.model_shape import ModelShape, shape_from_params
from shared.planning.profiles import resolve

SHAPE = shape_from_params(8_000_000_000, "llama")
SMOL = ModelShape(
    hidden=576,
    layers=30,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    tied=True,
)
GPU = Layout(
    capacity=4096,
    parallel="ddp",
    devices=4,
    checkpointing=False,
    dtype="bfloat16",
    cpu=False,
)
CPU = replace(GPU, capacity=512, parallel="single", devices=1, cpu=True)
DENSE = split(SHAPE, resolve("maximum_accuracy"), 8192)
LORA = split(SHAPE, resolve("lora_r16"), 16)


def test_the_total_is_the_sum_of_the_parts() -> None:
    memory = estimate(SHAPE, LORA, GPU, 0.0)
    assert memory.total == sum(getattr(memory, part) for part in Memory.__struct_fields__)
    assert min(getattr(memory, part) for part in Memory.__struct_fields__) > 0


def test_a_dense_8b_model_costs_16_bytes_per_weight_and_its_16_bit_copy() -> None:
    memory = estimate(SHAPE, DENSE, GPU, 0.0)
    dense = SHAPE.linear_parameters
    assert memory.trainable + memory.gradients + memory.optimizer == 16 * dense
    assert memory.weights >= 2 * SHAPE.parameters


def test_lora_r16_on_8b_trains_42_million_weights() -> None:
    """2.62 million per rank, as published."""
    assert sum(module.parameters for module in LORA) == pytest.approx(41.9e6, rel=0.01)


def test_sharding_divides_what_is_trained_and_frozen() -> None:
    whole, sharded = (estimate(SHAPE, DENSE, replace(GPU, parallel=way), 0.0) for way in ("ddp", "fsdp2"))
    assert sharded.optimizer == whole.optimizer // 4
    assert sharded.trainable == whole.trainable // 4
    assert sharded.total < whole.total


def test_checkpointing_keeps_little_more_than_one_layer() -> None:
    on = activation_bytes(SHAPE, LORA, replace(GPU, checkpointing=True), 0.0)
    off = activation_bytes(SHAPE, LORA, GPU, 0.0)
    assert on < off / 8


def test_activations_grow_with_the_pack_not_with_its_square() -> None:
    one = activation_bytes(SHAPE, LORA, GPU, 0.0)
    assert activation_bytes(SHAPE, LORA, replace(GPU, capacity=8192), 0.0) == 2 * one


def test_dropout_keeps_the_masked_inputs_of_lora_only() -> None:
    assert activation_bytes(SHAPE, LORA, GPU, 0.05) > activation_bytes(SHAPE, LORA, GPU, 0.0)
    assert activation_bytes(SHAPE, DENSE, GPU, 0.05) == activation_bytes(SHAPE, DENSE, GPU, 0.0)
