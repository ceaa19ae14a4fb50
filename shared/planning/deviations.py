"""List where a plan differs from its profile, each with the reason in plain words."""

from __future__ import annotations

from collections.abc import Iterator

from shared.messages.hardware import Hardware
from shared.planning.hardware import is_cpu, usable_memory
from shared.planning.memory_fit import holds_extras
from shared.planning.model_shape import ModelShape, ModulePlan
from shared.planning.plan import Deviation, Plan, Step
from shared.planning.profiles import (
    DENSE_SHARE,
    LORA_RATE,
    NARROW,
    RATE_ALPHA,
    pair_share,
    rate_exponent,
)
from shared.planning.recipe import Recipe
from shared.planning.throughput import MIN_STEPS, Rows

FITS_LESS = "the highest rank whose weights, gradients and optimiser fit in memory; alpha/rank is kept"
FITS_NO_WHOLE = "whole matrices, with their gradients and optimiser, don't fit in memory"


def deviations(
    recipe: Recipe, plan: Plan, step: Step, hardware: Hardware, shape: ModelShape, rows: Rows
) -> list[Deviation]:
    """Return every deviation of `plan` from `recipe`, in the order of their weight."""
    memory = f"{plan.memory_bytes / 2**30:.1f} of {usable_memory(hardware) / 2**30:.1f} GiB"
    return [
        *_of_modules(recipe, plan),
        *_of_extras(recipe, plan, hardware, shape, rows),
        *(_of_given_rate(recipe, plan) if recipe.rate else _of_rates(plan, shape, rows.pairs)),
        *_of_lengths(recipe, plan),
        *_of_batch(recipe, plan, step),
        *_of_layout(recipe, plan, hardware, memory),
        *_of_kernels(recipe, plan, hardware),
    ]


def _of_modules(recipe: Recipe, plan: Plan) -> Iterator[Deviation]:
    wanted = "trained whole" if recipe.full else f"LoRA rank {recipe.rank}, alpha {recipe.alpha:g}"
    groups: dict[tuple[str, int, int], list[ModulePlan]] = {}
    for module in plan.modules:
        even = _break_even(module) if module.method == "dense" else 0
        groups.setdefault((module.method, module.rank, even), []).append(module)
    for (method, rank, even), modules in groups.items():
        names = ", ".join(module.name for module in modules)
        if method == "dense" and not recipe.full and not recipe.searches:
            times = recipe.rank / even
            yield Deviation(
                names,
                wanted,
                "dense delta",
                f"above rank {even} = in*out/(in+out) the two factors cost more than the matrix: at rank "
                f"{recipe.rank} they hold {times:.1f} times its weights and give no more freedom",
            )
        elif method == "lora" and (recipe.full or rank != recipe.rank):
            yield Deviation(
                names,
                wanted,
                f"LoRA rank {rank}, alpha {modules[0].alpha:g}",
                FITS_LESS if rank < recipe.rank else FITS_NO_WHOLE,
            )
    if recipe.dropout > 0 and any(module.method == "dense" for module in plan.modules):
        yield Deviation(
            "dropout",
            f"{recipe.dropout:g}",
            "none on dense deltas",
            "LoRA's dropout acts on its factors' input",
        )


def _of_extras(
    recipe: Recipe, plan: Plan, hardware: Hardware, shape: ModelShape, rows: Rows
) -> Iterator[Deviation]:
    frozen = ["norms"] if recipe.norm_rate and not plan.extras.norms else []
    if recipe.embedding_rate and not plan.extras.embeddings:
        frozen += ["embeddings", "output matrix"]
    if frozen:
        reason = _why_frozen(recipe, plan, hardware, shape, rows)
        yield Deviation(", ".join(frozen), "trained", "frozen", reason)


def _why_frozen(recipe: Recipe, plan: Plan, hardware: Hardware, shape: ModelShape, rows: Rows) -> str:
    if not holds_extras(shape, plan.modules, plan.dtype):
        return "an adapter is submitted, which has no place for them"
    if rows.pairs:
        return "what rates they want for preference pairs isn't known"
    if plan.parallel == "fsdp2":
        return "each device would hold all of them, with their gradients, next to its part of the layers"
    if rows.divergence:
        return "the score has a distance from the base model, which is computed with its output matrix"
    epochs = rows.epochs(plan.train_s * plan.expected_tokens_per_s)
    if is_cpu(hardware) and plan.extras.norms and epochs < recipe.embedding_epochs:
        return (
            f"they make a CPU's steps longer, and there is time for {epochs:.2g} epochs, "
            f"fewer than {recipe.embedding_epochs:g}"
        )
    return "they don't fit in memory"


def _break_even(module: ModulePlan) -> int:
    return module.in_features * module.out_features // (module.in_features + module.out_features)


def _of_rates(plan: Plan, shape: ModelShape, pairs: bool) -> Iterator[Deviation]:
    alphas = {module.alpha for module in plan.modules if module.method == "lora"}
    if alphas:
        alpha = max(alphas)
        reason = _rate_formula(plan, shape, pairs, dense=False)
        if alpha != RATE_ALPHA:
            reason += f", times sqrt({RATE_ALPHA:g}/{alpha:g}) for alpha {alpha:g}"
        yield Deviation("learning rate of LoRA factors", "unset", f"{plan.lr_lora:.2e}", reason)
    if any(module.method == "dense" for module in plan.modules):
        reason = f"{DENSE_SHARE:g} of {_rate_formula(plan, shape, pairs, dense=True)}"
        yield Deviation("learning rate of dense deltas", "unset", f"{plan.lr_dense:.2e}", reason)


def _rate_formula(plan: Plan, shape: ModelShape, pairs: bool, *, dense: bool) -> str:
    exponent = rate_exponent(shape.family, shape.hidden, dense=dense)
    hidden = "hidden" if dense or shape.hidden >= NARROW else f"{NARROW}"
    formula = f"{LORA_RATE:g}*(2000/{hidden})^{exponent:g} for LoRA at alpha {RATE_ALPHA:g}"
    if pairs:
        return f"{pair_share(plan.expected_steps):.2g} (preference pairs, few steps allow more) of {formula}"
    return formula


def _of_given_rate(recipe: Recipe, plan: Plan) -> Iterator[Deviation]:
    if recipe.rate and plan.lr_dense < recipe.rate:
        reason = "it goes with the square root of the batch, which is smaller here"
        yield Deviation("learning rate", f"{recipe.rate:.2e}", f"{plan.lr_dense:.2e}", reason)


def _of_lengths(recipe: Recipe, plan: Plan) -> Iterator[Deviation]:
    if plan.max_length < recipe.max_length:
        yield Deviation(
            "longest row",
            f"{recipe.max_length} tokens",
            f"{plan.max_length} tokens",
            "longer rows are never scored, and the model has to be good at what is scored",
        )


def _of_batch(recipe: Recipe, plan: Plan, step: Step) -> Iterator[Deviation]:
    wanted = recipe.device_batch * recipe.accumulation * plan.devices
    got = f"about {step.examples:.0f} examples: {plan.packs_per_step} x {plan.capacity} tokens"
    if step.batch < wanted:
        reason = (
            f"{wanted} examples would leave {step.wanted_steps} steps, and fewer than {MIN_STEPS} are too few"
        )
        if step.examples > 1.5 * step.batch:
            reason += f"; a pack holds the longest row, so a step has more than {step.batch} examples"
        yield Deviation("batch", f"{wanted} examples", got, reason)
    elif step.examples < 0.8 * wanted or step.examples > 1.25 * wanted:
        yield Deviation(
            "batch",
            f"{wanted} examples",
            got,
            "packs are padded to one size, and all data is one step at most",
        )
    in_turn = plan.packs_per_step // plan.devices
    if in_turn > recipe.accumulation:
        yield Deviation(
            "accumulation",
            str(recipe.accumulation),
            f"{in_turn} packs in turn on each device",
            "one pack is what a device computes at a time; the gradient is that of the whole batch",
        )
    if plan.expected_steps < min(MIN_STEPS, recipe.most_steps or MIN_STEPS):
        reason = "the deadline, or the rows times the epoch limit, leaves no more at the smallest batch"
        yield Deviation("steps", f"at least {MIN_STEPS}", f"about {plan.expected_steps}", reason)
    yield Deviation(
        "evaluation batch",
        f"{recipe.eval_batch} examples",
        "as many as a batch of tokens holds",
        "the metric is a mean over examples and doesn't depend on how they are batched",
    )


def _of_layout(recipe: Recipe, plan: Plan, hardware: Hardware, memory: str) -> Iterator[Deviation]:
    ddp = f"DDP, {recipe.ddp_bucket_mb} MB buckets"
    if plan.parallel == "single":
        yield Deviation("parallel", ddp, "one process", "there is one device")
    elif plan.parallel == "fsdp2":
        reason = f"a full replica on each device doesn't fit; sharded it needs {memory}"
        yield Deviation("parallel", ddp, f"FSDP2 over {plan.devices} devices", reason)
    if recipe.activation_checkpointing and not plan.activation_checkpointing:
        reason = f"fits without ({memory}); recomputing would cost a third more time for the same numbers"
        yield Deviation("activation checkpointing", "on", "off", reason)
    if plan.activation_checkpointing and not recipe.activation_checkpointing:
        yield Deviation("activation checkpointing", "off", "on", f"doesn't fit without; with it {memory}")


def _of_kernels(recipe: Recipe, plan: Plan, hardware: Hardware) -> Iterator[Deviation]:
    if recipe.optimizer != "AdamW":
        reason = "its fp32 moments are more exact, and were counted when the plan was made to fit in memory"
        yield Deviation("optimiser", recipe.optimizer, "AdamW", reason)
    if recipe.bf16 and plan.dtype != "bfloat16":
        yield Deviation("precision", "bfloat16", plan.dtype, "this device has no fast bfloat16 products")
    if recipe.flash_attention and is_cpu(hardware):
        reason = "flash attention needs a GPU; the numbers are the same"
        yield Deviation("attention", "flash attention", "per-document attention of torch", reason)
    if recipe.compile and not plan.compile:
        reason = (
            "needs a C++ compiler, which a CPU machine need not have"
            if is_cpu(hardware)
            else "would save less than twice the time it costs"
        )
        yield Deviation("torch.compile", "on", "off", reason)
