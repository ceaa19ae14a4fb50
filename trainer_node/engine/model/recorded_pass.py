"""A pack's forward and backward pass, recorded once as a CUDA graph and replayed for every pack.

Small models wait for the CPU: a layer's pass and its gradients are about 300 kernels, and the CPU needs
longer to start them than the GPU to run them. A graph starts all of them at once. It reads and writes the
same memory each time, so packs are copied into tensors of fixed sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import structlog
import torch
from torch import Tensor

from shared.planning.architectures import Batching
from shared.planning.plan import Plan
from shared.planning.throughput import waits_for_launches
from trainer_node.engine.data.examples import IGNORED, Examples
from trainer_node.engine.data.packing import Batch, Packs, collate
from trainer_node.engine.data.token_noise import Noise
from trainer_node.engine.memory.oom import is_out_of_memory, release
from trainer_node.engine.model.adapters import Deltas
from trainer_node.engine.model.attention import waits_for_documents

WARM_UP = 2  # passes before all others: compilers and libraries choose their kernels in them
TOLERANCE = 0.05  # of a replay: on a GPU the same pass gives gradients up to .003 of their norm apart
SPARE = 1.25  # room for packs with more documents or labels than any of the first epoch's
log = structlog.get_logger(__name__)

Loss = Callable[[torch.nn.Module, Batch], Tensor]  # an objective
Pass = Callable[[], Tensor]  # computes a pack's gradients; its loss
Recorder = Callable[[Pass], tuple[Callable[[], None], Tensor]]  # what replays it, and the loss it writes to


@dataclass(frozen=True)
class Room:
    """The sizes of the tensors that every pack of a run is copied into."""

    capacity: int  # tokens
    documents: int  # with the pieces of the padding
    labels: int
    longest: int  # tokens of a document


def room_for(examples: Examples, packs: Sequence[Sequence[int]], capacity: int) -> Room:
    """Return room for these packs and for somewhat fuller ones."""
    longest = int(examples.lengths.max())
    counts = np.add.reduceat(examples.labels != IGNORED, examples.offsets[:-1], dtype=np.int64)
    documents = max(len(pack) + (capacity - int(examples.lengths[pack].sum())) // longest for pack in packs)
    labels = max(int(counts[pack].sum()) for pack in packs)
    return Room(
        capacity,
        documents=int(SPARE * documents) + 2,
        labels=min(capacity, int(SPARE * labels) + 1),
        longest=longest,
    )


def fitted_pack(batch: Batch, room: Room) -> Batch | None:
    """Return the pack with tensors of fixed sizes, which gives the same loss; None if it has no room.

    The padding becomes documents that are no longer than the longest, and further ones are empty. Further
    labels weigh nothing.
    """
    borders = batch.cu_seqlens[: batch.documents + 1].tolist()
    if batch.tokens < room.capacity:
        borders += [*range(batch.tokens + room.longest, room.capacity, room.longest), room.capacity]
    missing, free = room.documents + 1 - len(borders), room.labels - batch.label_tokens
    if missing < 0 or free < 0:
        return None

    def filled(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, free))

    return replace(
        batch,
        cu_seqlens=torch.tensor(borders + [room.capacity] * missing, dtype=torch.int32),
        document_lengths=[],
        max_seqlen=room.longest,
        label_positions_N=filled(batch.label_positions_N),
        labels_N=filled(batch.labels_N),
        weights_N=filled(batch.weights_N),
        label_documents_N=filled(batch.label_documents_N),
    )


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, code that waits for the GPU raises RuntimeError: also in the backward pass's thread.

    It would fail while it is recorded, and what is recorded by then keeps its GPU memory as long as the
    process lives: torch 2.12's allocator goes on believing that it is being recorded.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def on_cuda(compute: Pass) -> tuple[Callable[[], None], Tensor]:
    """Record a pass as a CUDA graph."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # around all of it: whatever fails, `current` is the stream again
        for _ in range(WARM_UP):
            compute()
        with no_waiting():
            compute()
        graph = torch.cuda.CUDAGraph()
        # Of this thread: another one may copy a checkpoint meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            loss = compute()
    current.wait_stream(side)
    return graph.replay, loss


class RecordedPass:
    """What stands in for a pack's passes, once the first one is recorded."""

    def __init__(self, deltas: Deltas, objective: Loss, room: Room, record: Recorder = on_cuda) -> None:
        self.deltas, self.objective, self.room = deltas, objective, room
        self._record = record
        self._parameters = list(deltas.parameters.values())
        self._gradients: list[Tensor] = []
        self._batch: Batch | None = None  # on the device
        self._scale = torch.ones((), device=self._parameters[0].device)
        self._replay: Callable[[], None] | None = None
        self._loss = self._scale

    def backward(
        self, examples: Examples, indices: Sequence[int], divisor: int, noise: Noise | None = None
    ) -> Tensor | None:
        """Add a pack's gradients to the parameters'; its loss, or None if it must be computed as usual."""
        if not self.deltas.model.recordable:
            return None
        pack = fitted_pack(collate(examples, indices, self.room.capacity, noise=noise), self.room)
        if pack is None:
            return None
        self._fill(pack, divisor)
        if self._replay is None and not self._recorded():
            return None
        assert self._replay is not None
        self._take_gradients()
        self._replay()
        return self._loss

    def _fill(self, pack: Batch, divisor: int) -> None:
        device = self._scale.device
        self._scale.fill_(1.0 / divisor)
        if self._batch is None:
            moved = {name: value.to(device) for name, value in _tensors(pack).items()}
            self._batch = replace(pack, **moved)
        kept = _tensors(self._batch)
        for name, value in _tensors(pack).items():
            source = value.pin_memory() if device.type == "cuda" else value
            kept[name].copy_(source, non_blocking=True)

    def _recorded(self) -> bool:
        """Record the pass; False, and never again with this model, if its code can't be recorded."""
        cause = ""
        try:
            # Before the recording: it keeps as much memory as a pass takes, and a pass next to it would take
            # that again (six layers of SmolLM2, 8,192 tokens: 3.7 GiB at most, where 2.1 suffice).
            loss, usual = self._usual()
            self._replay, self._loss = self._record(self._compute)
            if (error := self._error(loss, usual)) > TOLERANCE:
                cause = f"what is replayed is off by {error:.3g}"
        except Exception as failure:
            if isinstance(failure, torch.AcceleratorError) and not is_out_of_memory(failure):
                torch.cuda.synchronize()  # raises if nothing works on this device any more
            cause = str(failure.__context__ or failure).partition("\n")[0][:200] or type(failure).__name__
        if cause:  # outside of the handler, which holds what the pass had in memory
            log.warning("training runs without a CUDA graph, which is slower", cause=cause)
            self.deltas.model.recordable = False
            self._replay, self._gradients, self._batch, self._loss = None, [], None, self._scale
            release()
            return False
        log.info("passes are recorded as a CUDA graph", room=self.room)
        return True

    def _usual(self) -> tuple[Tensor, list[Tensor]]:
        """Compute once as usual: the loss and the gradients."""
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        loss, usual = self._compute(), self._gradients
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        return loss, usual

    def _error(self, loss: Tensor, usual: list[Tensor]) -> float:
        """Replay once: how far the gradients are from the usual ones, as a share of their norm."""
        assert self._replay is not None
        torch._foreach_zero_(self._gradients)
        self._replay()
        norms = [torch.stack(torch._foreach_norm(usual)).norm()]
        torch._foreach_sub_(usual, self._gradients)
        norms.append(torch.stack(torch._foreach_norm(usual)).norm())
        error = torch.maximum(
            norms[1] / norms[0].clamp(min=1e-30), (self._loss - loss).abs() / (1 + loss.abs())
        )
        return float(error) if torch.isfinite(error) or not torch.isfinite(loss) else math.inf

    def _compute(self) -> Tensor:
        assert self._batch is not None
        loss = self.objective(self.deltas.model, self._batch) * self._scale
        gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        torch._foreach_add_(self._gradients, gradients)
        return loss.detach()

    def _take_gradients(self) -> None:
        """Let the parameters' gradients be those that the recording adds to; what they were is kept."""
        if self._parameters[0].grad is self._gradients[0]:
            return
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient


def _tensors(batch: Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def recorded_pass_for(
    plan: Plan, deltas: Deltas, objective: Loss, examples: Examples, packs: Packs
) -> RecordedPass | None:
    """Return a recorded pass where it is exact and pays: a small model's supervised steps on one GPU.

    Dropout draws other numbers for every pack, preference pairs and compared places differ in number, rows
    with rotary frequencies of their own are looked up on the host, as are documents that are attended one by
    one, and recomputed layers belong to models that are large enough to keep a GPU busy.
    """
    model = deltas.model
    packed = model.recordable and model.batching is Batching.PACKED
    plain = examples.group == 1 and examples.base is None
    alike = model.rotary_limit is None or int(examples.lengths.max()) <= model.rotary_limit
    exact = packed and plain and alike and not (plan.dropout and deltas.lora)
    single = plan.parallel == "single" and not plan.activation_checkpointing and plan.dtype == "bfloat16"
    device = next(iter(deltas.parameters.values())).device
    if not (exact and single and device.type == "cuda"):
        return None
    layers = model.base.config.get_text_config().num_hidden_layers
    weights = sum(weight.numel() for weight in deltas.network.parameters())
    if not waits_for_launches(weights, layers, plan.capacity) or waits_for_documents(model.base, device):
        return None
    return RecordedPass(deltas, objective, room_for(examples, packs.of_epoch(), plan.capacity))
