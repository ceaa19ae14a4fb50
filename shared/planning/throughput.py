"""Estimate how fast a run trains, and how long it takes to start and to finish, until measured."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from shared.messages.hardware import Hardware
from shared.planning.hardware import flops_per_s, is_cpu
from shared.planning.memory_fit import NO_EXTRAS, Layout
from shared.planning.model_shape import Extras, ModelShape, ModulePlan

FILL = 0.97  # real tokens of a pack's capacity
FSDP_SHARE = 0.9  # of DDP's speed: every layer is gathered twice per pack
COMPILE_GAIN = 1.25  # on an H100 1.31 at 1B, 1.27 recomputed, 1.33 at 135M; 8B on 8 of them 1.16 (torchtitan)
COMPILE_S = 45.0  # one layer's graph, forward and backward: 8 to 16 s on an H100 with 16 cores
IMPORT_S = 15.0  # torch, transformers and peft, and a model's first use
MODEL_BYTES_PER_S = 500e6  # of a disk, for files of models; a synced save is slower
# To start a layer's kernels, both ways: 135M takes .1 s for 30 layers, however short the pack (H100).
LAYER_S = 0.0033
# The same where a graph starts them: 135M with packs of 1,536 and 8,192 tokens takes 28 and 52 ms, which is
# 23 ms for 30 layers and 24% of the peak for the tokens; 0.5B with 4,096 tokens 56 ms.
RECORDED_LAYER_S, RECORDED_SHARE = 0.00077, 0.25
LARGE_PRODUCTS = 4e14  # FLOP/s that a GPU reaches in large products: 40% of an H100's peak
CHECKPOINT_SHARE = 0.05  # of training time: checkpoints and evaluation on the way
EVALUATION_SHARE = 0.05  # of the budget: what one evaluation may cost
SAFETY = 1.25  # the reserve is this much larger than the measurements say: the closing runs once, unrehearsed
SLACK_S = 1.0  # for what isn't measured: the digest, the outcome's fsync
VERIFY_SHARE = 0.01  # of the budget: what scoring the reloaded export may cost
VERIFY_MOST_S = 60.0  # and in any case: a broken export shows on its first rows
SAVE_BYTES_PER_S = 300e6  # of a synced, hashed save, until one is measured
FIXED_S = 0.5  # of each save and export: files made, synced and renamed
MIN_STEPS = 100  # fewer optimiser steps are too few: the batch is halved until there are as many
MOST_WHOLE_BYTES = 40e9  # of a model that is submitted whole for the sake of frozen weights
MOST_RESERVE, MOST_START = 0.5, 0.3  # shares of the budget, however small it is


class Costs(Struct, kw_only=True):
    """Seconds that the parts of a run take on its clock: estimates first, replaced by measurements."""

    import_s: float = 0.0  # start a process: what its imports take
    load_s: float = 0.0  # load the model once
    ingest_s: float = 0.0  # read and tokenise the data
    score_s: float = 0.0  # score the development rows once
    save_s: float = 0.0  # one checkpoint, until it is on disk
    export_s: float = 0.0  # write the submission, and load the model for it where that is needed
    verify_s: float = 0.0  # score the reloaded submission on a few rows

    @property
    def closing_s(self) -> float:
        """Return the seconds of all that must follow the last step: save, score, export, reload, verify.

        What can't be cut short counts SAFETY times; scoring and verifying watch the clock. The last save goes
        on during scoring and is at most half of one with an optimiser. No time is kept for other candidates
        than the last weights: after a decay to zero the average seldom wins, and what the safety margin
        leaves over may suffice to try it.
        """
        first = max(self.score_s, SAFETY * self.save_s / 2)
        return first + SAFETY * (self.export_s + self.load_s) + self.verify_s

    @property
    def reserve_s(self) -> float:
        """Return what a schedule keeps of the time, but for one late step."""
        return self.closing_s + 2 * SLACK_S


class Measured(Struct, frozen=True, kw_only=True):
    """What a run measured before its plan is made."""

    load_s: float
    score_s: float  # of all development rows that are scored
    save_bytes_per_s: float = SAVE_BYTES_PER_S
    reload_s: float = 0.0  # load the model once more, which some exports begin with


def expected_costs(
    shape: ModelShape,
    modules: Sequence[ModulePlan],
    measured: Measured,
    budget_s: float,
    extras: Extras = NO_EXTRAS,
    *,
    whole: bool = False,
) -> Costs:
    """Return what the closing takes: bytes over the disk's speed where nothing was measured.

    An export is written, and then read once for its digest. `whole`: it is the whole model, whatever is
    trained.
    """
    trained = sum(module.parameters for module in modules) + extras.parameters
    rate = measured.save_bytes_per_s
    return Costs(
        load_s=measured.load_s,
        score_s=measured.score_s,
        save_s=FIXED_S + 12 * trained / rate,
        export_s=measured.reload_s + FIXED_S + 2 * export_bytes(shape, modules, whole=whole) / rate,
        verify_s=verify_limit_s(budget_s),
    )


def verify_limit_s(budget_s: float) -> float:
    """Return what scoring the reloaded export may cost."""
    return min(VERIFY_MOST_S, VERIFY_SHARE * budget_s)


def export_bytes(shape: ModelShape, modules: Sequence[ModulePlan], *, whole: bool = False) -> int:
    """Size of what is submitted: the whole model in 16 bits if any delta is dense, else fp32 factors.

    `whole`: frozen weights are submitted, too.
    """
    if whole or any(module.method == "dense" for module in modules):
        return 2 * shape.parameters
    return 4 * sum(module.parameters for module in modules)


def moving_s(shape: ModelShape, modules: Sequence[ModulePlan]) -> float:
    """Return how long reading the model and writing the result take, at the least."""
    return (2 * shape.parameters + export_bytes(shape, modules)) / MODEL_BYTES_PER_S


def is_submitted_whole(parameters: int) -> bool:
    """Return whether a model is submitted whole if its frozen weights were damaged, and are restored."""
    return 2 * parameters <= MOST_WHOLE_BYTES


class Rows(Struct, frozen=True):
    """The properties of the data that speed depends on."""

    count: int
    mean_length: float  # tokens
    label_share: float  # of the tokens
    pairs: bool = False  # a row is a preference pair, both documents counted
    divergence: bool = False  # from the base model is a part of a row's loss

    def epochs(self, tokens: float) -> float:
        """Return how many epochs so many tokens are."""
        return tokens / (self.count * self.mean_length)

    @property
    def plain(self) -> bool:
        """Return whether the loss is that of the labels alone; else the base model reads the rows first."""
        return not (self.pairs or self.divergence)


class Pace(Struct, frozen=True):
    """The time budget of a run, and what it allows."""

    tokens_per_s: float  # real tokens of training, on all devices together
    train_s: float
    reserve_s: float
    dev_examples: int  # development rows that one evaluation can afford
    compile: bool


def flops_per_token(
    shape: ModelShape,
    modules: Sequence[ModulePlan],
    rows: Rows,
    *,
    checkpointing: bool,
    extras: Extras = NO_EXTRAS,
) -> float:
    """Return the training FLOPs of a token: 4 per frozen weight, 6 per trained one, 2 each to recompute.

    Embeddings cost nothing, the output matrix counts at scored positions, attention by half the mean row. A
    trained output matrix is multiplied twice more: for its gradient, and for its logits once more, where
    they are made in several chunks.
    """
    attention = 2.0 * shape.heads * shape.head_dim * rows.mean_length * shape.layers
    head = (2.0 if extras.embeddings else 1.0) * 2.0 * shape.hidden * shape.vocab * rows.label_share
    lora = 2.0 * sum(module.parameters for module in modules if module.method == "lora")
    dense = 2.0 * sum(module.parameters for module in modules if module.method == "dense")
    layers = 2.0 * (shape.linear_parameters - shape.idle_parameters)
    forward = layers + lora + attention
    backward = layers + dense + 2.0 * lora + 2.0 * attention
    return forward + backward + 2.0 * head + (forward if checkpointing else 0.0)


def waits_for_launches(weights: int, layers: int, tokens: int) -> bool:
    """Return whether starting a pack's kernels takes longer than 6 operations for each weight and token."""
    return 6.0 * weights * tokens / LARGE_PRODUCTS < LAYER_S * layers


def is_recorded(shape: ModelShape, layout: Layout, *, dropout: float, plain: bool) -> bool:
    """Return whether the engine trains such packs, of `plain` rows, by passes recorded as a CUDA graph."""
    exact = not dropout and plain and not layout.checkpointing and layout.dtype == "bfloat16"
    small = waits_for_launches(shape.parameters, shape.layers, layout.capacity)
    return exact and small and layout.parallel == "single" and not layout.cpu


def small_model_gain(shape: ModelShape, layout: Layout, flops: float, hardware: Hardware) -> float:
    """Return how much faster a pack trains recorded than started kernel by kernel; `flops` are a token's."""
    work = layout.capacity * flops
    started = max(work / flops_per_s(hardware, layout.dtype), LAYER_S * shape.layers)
    return max(1.0, started / _recorded_s(shape, layout, work))


def _recorded_s(shape: ModelShape, layout: Layout, work: float) -> float:
    return work / (RECORDED_SHARE / 0.4 * LARGE_PRODUCTS) + RECORDED_LAYER_S * shape.layers


def estimated_rate(
    shape: ModelShape, layout: Layout, flops: float, hardware: Hardware, *, recorded: bool
) -> float:
    """Return real tokens/s of training on all devices, not compiled; small models wait for launches."""
    share = FSDP_SHARE if layout.parallel == "fsdp2" else 1.0
    rate = share * flops_per_s(hardware, layout.dtype) / flops
    if is_cpu(hardware):
        return FILL * rate
    devices = layout.devices
    pack_s = max(layout.capacity * devices / rate, LAYER_S * shape.layers)
    if recorded:
        pack_s = min(pack_s, _recorded_s(shape, layout, layout.capacity * flops))
    return FILL * layout.capacity * devices / pack_s


def pace(
    shape: ModelShape,
    modules: Sequence[ModulePlan],
    layout: Layout,
    rows: Rows,
    hardware: Hardware,
    budget_s: float,
    *,
    compiles: bool,
    dropout: float = 0.0,
    extras: Extras = NO_EXTRAS,
    measured: float | None = None,
    closing: Measured | None = None,
) -> Pace:
    """Divide `budget_s` into start, training and reserve.

    `measured` tokens/s, of layers that aren't compiled, and `closing` replace the estimates.
    torch.compile is used only if it saves more than twice what it costs, and never on a CPU, where it needs a
    C++ compiler.
    """
    flops = flops_per_token(shape, modules, rows, checkpointing=layout.checkpointing, extras=extras)
    recorded = is_recorded(shape, layout, dropout=dropout, plain=rows.plain)
    rate = measured or estimated_rate(shape, layout, flops, hardware, recorded=recorded)
    # A forward pass costs half of LoRA's step and a third of a dense one: half is the cautious figure.
    affordable = int(2 * rate * EVALUATION_SHARE * budget_s / rows.mean_length)
    dev = max(1, min(development_rows(rows.count), affordable))
    evaluation = dev * rows.mean_length / (2 * rate)
    load = IMPORT_S + 2 * shape.parameters / MODEL_BYTES_PER_S
    closing = closing or Measured(load_s=load, score_s=evaluation)
    reserve = min(
        expected_costs(shape, modules, closing, budget_s, extras).reserve_s, MOST_RESERVE * budget_s
    )
    start = min(load + evaluation, MOST_START * budget_s)
    train = (budget_s - reserve - start) * (1 - CHECKPOINT_SHARE)
    if not rows.plain:
        train = _after_references(train, rows.count * rows.mean_length / (2 * rate))
    compiled = compiles and not is_cpu(hardware) and train * (1 - 1 / COMPILE_GAIN) > 2 * COMPILE_S
    if compiled:
        train -= COMPILE_S
        rate *= COMPILE_GAIN
    return Pace(rate, max(0.0, train), reserve, dev, compiled)


def _after_references(train_s: float, all_s: float) -> float:
    """Return the time left to train when every row that is seen was first read by the base model.

    All rows take `all_s`; if less than one epoch can be trained, reading the rows of it takes half as long as
    training on them.
    """
    return max(train_s / 1.5, train_s - all_s)


def development_rows(examples: int) -> int:
    """Return how many of a job's examples are held out to choose and verify by; at least one."""
    return max(1, min(1000, max(min(400, examples // 5), examples // 33)))
