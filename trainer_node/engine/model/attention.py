"""Attention over packs: every document sees itself and nothing else.

One function under a name of our own, registered with transformers; a model calls it in every layer with what
`attention_kwargs` says about the pack. On a CPU it is one causal SDPA per document, which gives bit for bit
what the document gives alone. On CUDA it is a varlen kernel: the flash-attn package's if that is installed
and healthy, else torch's own. Without pack arguments it is plain causal attention over each row.
Transformers' packing by position ids isn't used: with a cache or a mask it lets documents see each other,
silently.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from shared.errors import EngineError
from shared.messages.runs import ErrorCode
from trainer_node.engine.data.packing import Batch
from trainer_node.engine.model.kernels import varlen_attention
from trainer_node.engine.model.kernels.plain_attention import plain_attention
from trainer_node.engine.model.kernels.varlen_attention import Kernel
from trainer_node.engine.model.shape import heads_of

NAME = "podium_packed"
TOLERANCE = 2e-2  # of a healthy bf16 kernel against fp32 math, inputs of size 1
# In training on a CPU, bf16 documents up to so many tokens are attended in fp32: forward and backward take
# 0.26 ms instead of 0.75 at 32 tokens, 2.6 instead of 8.5 at 128, the same from 256 on (9 heads, one core).
# Scoring stays in bf16: the scorer's rounding is part of its numbers (2e-4 on the tiny oracle).
FP32_UP_TO = 256


# Documents of the self-test: shorter than a kernel's tile, one token, and over several tiles of 128 tokens;
# empty ones between them and at the end, which recorded packs have. The window ends inside the second tile.
TEST_LENGTHS = (7, 0, 1, 56, 0, 0, 129, 300, 0, 0)
TEST_WINDOW = 150


class Form(NamedTuple):
    """What a kernel may be unable to do: it is tried on this form before it is used."""

    heads: int = 4
    groups: int = 2  # pairs of key and value
    dim: int = 64
    windowed: bool = False


class Chosen(NamedTuple):
    """The kernel that attends."""

    name: str
    run: Kernel
    passed_over: str = ""  # those before it, and why


# (q_BHTD, k_BKTD, v_BKTD, scale, window) -> out_BHTD, causal
Attend = Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor]
log = structlog.get_logger(__name__)


def install(model: PreTrainedModel) -> None:
    """Make a model use packed attention; EngineError(UNSUPPORTED) if its code has no place for it."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    if not model._can_set_attn_implementation():
        raise EngineError(
            ErrorCode.UNSUPPORTED,
            f"{type(model).__name__} has no replaceable attention, which packing needs",
        )
    model.set_attn_implementation(NAME)


class AttentionLayout:
    """Where a pack's documents lie.

    A plain class, which torch.compile doesn't look into: as a list, every other number of documents compiled
    every layer again.
    """

    def __init__(self, document_lengths: list[int], cu_seqlens: Tensor, max_seqlen: int) -> None:
        self.document_lengths = document_lengths
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen


def attention_kwargs(batch: Batch) -> dict[str, Any]:
    """Return what a model must hand through to every layer's attention."""
    return {"layout": AttentionLayout(batch.document_lengths, batch.cu_seqlens, batch.max_seqlen)}


def max_documents(capacity: int, heads: int, head_dim: int) -> int:
    """Most documents in a pack before the 32-bit offsets of the CUDA kernels' backward pass overflow.

    From FlashAttention 2: (tokens + 128 * documents) * heads * (head_dim rounded up to 32) must stay below
    2**31.
    """
    tokens = (2**31 - 1) // (heads * -(-head_dim // 32) * 32)
    return max(1, (tokens - capacity) // 128 - 1)  # one less: the padding is a document, too


def _no_mask(*_: Any, **__: Any) -> None:
    """Packs need no mask: the documents' borders say it all."""


@torch.compiler.disable  # the layout changes with every pack and must not become part of a graph
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    layout: AttentionLayout | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within documents: query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D].

    What only some models ask for, soft-capped scores and sinks (`s_aux`), no fused kernel computes here.
    """
    if attention_mask is not None or dropout:
        raise EngineError(
            ErrorCode.UNSUPPORTED, f"{type(module).__name__} asks for attention that packing doesn't support"
        )
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary factors may have widened them
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    attend: Attend = _causal
    if softcap is not None or s_aux is not None:
        attend = partial(plain_attention, softcap=softcap, sinks_H=s_aux)
    if layout is None or len(layout.document_lengths) == 1:
        return attend(query, key, value, scale, sliding_window).transpose(1, 2), None
    if attend is _causal and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        size = value.shape[3]
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, widened(value, query.shape[3])))
        form = Form(query.shape[1], key.shape[1], query.shape[3], sliding_window is not None)
        kernel = _kernel(query.device, form)
        out = kernel.run(q, k, v, layout.cu_seqlens, layout.max_seqlen, scale, sliding_window)
        return out[..., :size].unsqueeze(0), None
    lengths = layout.document_lengths or lengths_of(layout.cu_seqlens)
    return _per_document(query, key, value, lengths, scale, sliding_window, attend), None


def lengths_of(cu_seqlens: Tensor) -> list[int]:
    """Return the lengths of the documents between borders, without the empty ones; waits for the device."""
    return [length for length in cu_seqlens.diff().tolist() if length]


def widened(value: Tensor, size: int) -> Tensor:
    """Return values as wide as keys: latent attention's are narrower, which no kernel takes.

    Those that are as wide are not copied, as `pad` would do in every layer.
    """
    return value if value.shape[-1] == size else F.pad(value, (0, size - value.shape[-1]))


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Dense causal attention, [B, H, T, D]."""
    length = query.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


def _per_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scale: float,
    window: int | None,
    attend: Attend = _causal,
) -> Tensor:
    """Compute one causal attention per document, [1, H, T, D] -> [1, T, H, D]."""
    given = [tensor.split(lengths, 2) for tensor in (query, key, value)]
    exact = (
        [tensor.float().split(lengths, 2) for tensor in (query, key, value)] if query.requires_grad else given
    )
    outputs = []
    with torch.autocast(query.device.type, enabled=False):  # it would turn fp32 back into bf16
        for index, length in enumerate(lengths):
            q, k, v = (pieces[index] for pieces in (exact if length <= FP32_UP_TO else given))
            outputs.append(attend(q, k, v, scale, window).transpose(1, 2))
    return torch.cat(outputs, 1).to(query.dtype)


def _dense() -> Kernel:
    """Compute one SDPA per document, where no varlen kernel works; waits for the device in every call."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, window: int | None
    ) -> Tensor:
        query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
        return _per_document(query, key, value, lengths_of(cu), scale, window)[0]

    return run


PER_DOCUMENT = "sdpa-per-document"
_KERNELS = {
    "flash-attn-3": varlen_attention.flash_attn_3,
    "flash-attn": varlen_attention.flash_attn,
    "flash-attn-4": varlen_attention.flash_attn_4,
    "torch-varlen": varlen_attention.torch_varlen,
    PER_DOCUMENT: _dense,
}


def choose_kernels(config: PretrainedConfig, device: torch.device) -> list[Chosen]:
    """Test the kernels on every form that a model needs, before its first step; EngineError if none is right.

    Return those chosen; a CPU has none. The first attention may come inside a recomputed layer, and the first
    step is timed.
    """
    return [_kernel(device, form) for form in forms_of(config)] if device.type == "cuda" else []


def slower_because(chosen: Iterable[Chosen]) -> str | None:
    """Return what to tell people if documents are attended one by one; None if a fused kernel does it."""
    slow = next((kernel for kernel in chosen if kernel.name == PER_DOCUMENT), None)
    if slow is None:
        return None
    return f"training is slower: no attention kernel for whole packs works on this GPU ({slow.passed_over})"


def waits_for_documents(model: PreTrainedModel, device: torch.device) -> bool:
    """Return whether a model's packs are attended document by document, whose lengths a GPU must tell.

    That is so with soft-capped scores and sinks, which no fused kernel computes, and where none works. No
    pass can be recorded then. The model may have no weights.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    if capped or sinks:
        return True
    return any(kernel.name == PER_DOCUMENT for kernel in choose_kernels(model.config, device))


def check_kernels(device: torch.device, forms: Iterable[Form]) -> list[Chosen]:
    """Return what attends on a device for each form; EngineError if nothing there computes right."""
    chosen = []
    for form in forms:
        if device.type == "cuda":
            chosen.append(_kernel(device, form))
        elif not _tested(_dense(), device, form) <= TOLERANCE:  # NaN is wrong, too
            raise EngineError(ErrorCode.DEVICE, f"attention computes wrong on {device}: {form}")
        else:
            chosen.append(Chosen(PER_DOCUMENT, _dense()))
    return chosen


def forms_of(config: PretrainedConfig) -> list[Form]:
    """Return the forms of attention that a model's configuration names."""
    text = config.get_text_config()
    heads, dim = heads_of(config)
    groups = getattr(text, "num_key_value_heads", None) or heads
    windows = [False, True] if getattr(text, "sliding_window", None) else [False]
    return [Form(heads, groups, dim, windowed) for windowed in windows]


@cache
def _kernel(device: torch.device, form: Form) -> Chosen:
    """Return the first kernel that is installed and computes right; log it and those passed over."""
    causes: list[str] = []
    for name, load in _KERNELS.items():
        try:
            kernel = load()
            error = _tested(kernel, device, form)
        except Exception as failure:  # whatever a kernel or its compiler raises: try the next one
            causes.append(f"{name}: {_passed_over(name, failure)}")
            continue
        if error <= TOLERANCE:
            log.info("attention kernel", kernel=name, device=str(device), form=form, error=error)
            return Chosen(name, kernel, "; ".join(causes))
        log.warning("attention kernel is wrong", kernel=name, device=str(device), error=error)
        causes.append(f"{name}: off by {error:.3g}")
    raise EngineError(ErrorCode.DEVICE, f"no attention kernel computes right on {device}")


def _passed_over(name: str, failure: Exception) -> str:
    """Return why a kernel can't be used; one that isn't installed is no reason to warn, a broken one is."""
    cause = str(failure).partition("\n")[0][:200]
    if isinstance(failure, ModuleNotFoundError) and failure.name in varlen_attention.MODULES:
        log.info("attention kernel not installed", kernel=name, cause=cause)
        return "not installed"
    log.warning("attention kernel not usable", kernel=name, cause=cause)
    return cause


def _tested(kernel: Kernel, device: torch.device, form: Form) -> float:
    """Return a kernel's error, found in a thread of its own.

    Gradients may be off around the caller (scoring), autocast on, and inside a recomputed layer what a
    backward pass needs is not kept: all of that belongs to the caller's thread.
    """

    def test() -> float:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread begins with the first GPU
        return kernel_error(kernel, device, form)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(test).result()


def kernel_error(
    kernel: Kernel, device: torch.device, form: Form, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Largest error of a kernel's output and gradients against fp32 math, on documents of TEST_LENGTHS."""
    lengths, scale, window = list(TEST_LENGTHS), form.dim**-0.5, TEST_WINDOW if form.windowed else None
    random = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, form.dim) for count in (form.heads, form.groups, form.groups)]
    inputs = [torch.randn(shape, generator=random).to(dtype).to(device) for shape in shapes]
    gradient = torch.randn(shapes[0], generator=random).to(dtype).to(device)
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    tested = [tensor.clone().requires_grad_() for tensor in inputs]
    q, k, v = tested
    found = kernel(q, k, v, borders, max(lengths), scale, window)
    found.backward(gradient)
    exact = [tensor.float().requires_grad_() for tensor in inputs]
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in exact)
    documents = [length for length in lengths if length]  # the reference knows no empty ones
    wanted = _per_document(query, key, value, documents, scale, window)[0]
    wanted.backward(gradient.float())
    pairs = [(found, wanted.detach()), *((a.grad, b.grad) for a, b in zip(tested, exact, strict=True))]
    errors = [((a.detach().float() - b).abs().max() / (1 + b.abs().max())) for a, b in pairs]
    return float(torch.stack(errors).max())
