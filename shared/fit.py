"""The memory ladder: which modules are trained how, laid out how, so that a run fits its hardware."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from msgspec import Struct
from msgspec.structs import replace

from shared.errors import PlanError
from shared.messages import Hardware
from shared.planning.hardware import device_count, is_cpu, usable_memory
from shared.planning.memory_fit import Layout, Memory, estimate
from shared.planning.model_shape import ModelShape, ModulePlan
from shared.planning.profiles import Recipe

GRAIN = 64  # tokens; capacities are multiples of it
CPU_CAPACITIES = (1024, 512, 256, 128, 64)
GPU_CAPACITIES = (16384, 8192, 4096, 2048, 1024)
LARGE_CAPACITIES = (65536, 32768)  # taken if they fit on the same rung: fewer, larger kernels
LOWER_RANKS = (1024, 512, 256, 128, 64, 32, 16, 8)


class Fit(Struct, frozen=True):
    """The highest rung of the ladder that fits."""

    modules: list[ModulePlan]
    layout: Layout
    memory: Memory


def split(shape: ModelShape, recipe: Recipe, rank: int) -> list[ModulePlan]:
    """LoRA up to the break-even rank in*out/(in+out), above it a dense delta: as free, with fewer weights.

    A lowered rank keeps the recipe's alpha/rank.
    """
    modules = []
    for linear in shape.linears:
        if linear.name not in recipe.targets:
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


def round_up(tokens: float) -> int:
    """The next multiple of GRAIN, at least one."""
    return max(1, ceil(tokens / GRAIN)) * GRAIN


def fit(recipe: Recipe, shape: ModelShape, hardware: Hardware, dtype: str, longest: int, most: float) -> Fit:
    """Climb down until it fits: DDP, checkpointing, FSDP2, smaller packs, lower rank.

    `longest` is the longest row kept (a pack holds at least one row), `most` the tokens of one device's step.
    Raises PlanError with the bytes that the last rung still needs.
    """
    limit = usable_memory(hardware)
    floor = round_up(longest)
    least = None
    for rank in (recipe.rank, *(rank for rank in LOWER_RANKS if rank < recipe.rank)):
        modules = split(shape, recipe, rank)
        for layout in _layouts(hardware, recipe, dtype, floor, max(floor, round_up(most))):
            memory = estimate(shape, modules, layout, recipe.dropout)
            if memory.total <= limit:
                return _enlarge(
                    Fit(modules, layout, memory), shape, recipe, limit, max(floor, round_up(most))
                )
            least = memory.total if least is None else min(least, memory.total)
    raise PlanError(
        f"{shape.parameters / 1e9:.2f} billion parameters need at least {(least or 0) / 2**30:.1f} GB "
        f"on one device, and a run may use {limit / 2**30:.1f} GB of {hardware.name}"
    )


def _layouts(hardware: Hardware, recipe: Recipe, dtype: str, floor: int, cap: int) -> Iterator[Layout]:
    """The rungs of one rank, best first: parallel and checkpointing inside, capacity outside."""
    devices, cpu = device_count(hardware), is_cpu(hardware)
    rungs = [("ddp" if devices > 1 else "single", False), ("ddp" if devices > 1 else "single", True)]
    if devices > 1:
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
