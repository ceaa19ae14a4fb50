"""Packed attention: each document as if it were alone, on the CPU bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import EngineError
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import Batch, collate
from trainer_node.engine.model import attention
from trainer_node.engine.model.attention import (
    _KERNELS,
    AttentionLayout,
    Form,
    _dense,
    attention_kwargs,
    install,
    kernel_error,
    max_documents,
    packed_attention,
)
from trainer_node.engine.model.loading import load_model

LENGTHS = [9, 1, 30, 4]


@pytest.fixture
def model(tiny_model: Path) -> torch.nn.Module:
    network = load_model(str(tiny_model), torch.float32)
    install(network)
    return network


def logits_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    return model(
        input_ids=batch.ids_T[None],
        position_ids=batch.positions_T[None],
        use_cache=False,
        **attention_kwargs(batch),
    ).logits[0]


@torch.no_grad()
def test_packed_equals_one_by_one_and_the_stock_model(
    model: torch.nn.Module, tiny_model: Path, make_examples: Callable[..., Examples]
) -> None:
    examples = make_examples(LENGTHS)
    batch = collate(examples, [0, 1, 2, 3], 50)  # with padding
    packed = logits_of(model, batch)[: batch.tokens].split(LENGTHS)
    stock = load_model(str(tiny_model), torch.float32)
    for index, found in enumerate(packed):
        alone = collate(examples, [index], LENGTHS[index])
        torch.testing.assert_close(found, logits_of(model, alone), atol=2e-5, rtol=1e-5)
        reference = stock(input_ids=alone.ids_T[None], use_cache=False).logits[0]
        torch.testing.assert_close(found, reference, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_itself_is_bit_equal_to_one_by_one() -> None:
    query, key, value = torch.randn(1, 4, 44, 16), torch.randn(1, 2, 44, 16), torch.randn(1, 2, 44, 16)
    borders = torch.tensor([0, 9, 10, 40, 44], dtype=torch.int32)
    module = torch.nn.Module()
    packed, _ = packed_attention(
        module, query, key, value, None, layout=AttentionLayout(LENGTHS, borders, 44)
    )
    start = 0
    for length in LENGTHS:
        span = slice(start, start + length)
        alone, _ = packed_attention(module, query[:, :, span], key[:, :, span], value[:, :, span], None)
        assert torch.equal(packed[:, span], alone)
        start += length


@torch.no_grad()
def test_no_document_sees_another(model: torch.nn.Module, make_examples: Callable[..., Examples]) -> None:
    batch = collate(make_examples(LENGTHS), [0, 1, 2, 3], 44)
    before = logits_of(model, batch)
    batch.ids_T[:9] = (batch.ids_T[:9] + 17) % 1000  # another first document
    after = logits_of(model, batch)
    assert torch.equal(before[9:], after[9:])
    assert not torch.allclose(before[:9], after[:9])


def test_a_sliding_window_hides_what_is_further_back() -> None:
    query, key, value = torch.randn(1, 4, 12, 16), torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)
    windowed, _ = packed_attention(torch.nn.Module(), query, key, value, None, sliding_window=3)
    alone, _ = packed_attention(torch.nn.Module(), query[:, :, 9:], key[:, :, 9:], value[:, :, 9:], None)
    torch.testing.assert_close(windowed[:, 11], alone[:, 2])
    wide, _ = packed_attention(torch.nn.Module(), query, key, value, None, sliding_window=12)
    full, _ = packed_attention(torch.nn.Module(), query, key, value, None)
    assert torch.equal(wide, full)


def test_what_no_kernel_does_is_refused() -> None:
    tensors = [torch.randn(1, 2, 4, 16)] * 3
    with pytest.raises(EngineError, match="doesn't support"):
        packed_attention(torch.nn.Module(), *tensors, torch.ones(4, 4))


def test_document_limit_keeps_offsets_in_32_bits() -> None:
    for capacity, heads, head_dim in [(16384, 32, 128), (65536, 64, 128), (8192, 9, 64)]:
        documents = max_documents(capacity, heads, head_dim)
        assert (capacity + 128 * (documents + 1)) * heads * head_dim < 2**31
        assert (capacity + 128 * (documents + 3)) * heads * head_dim >= 2**31


@pytest.mark.parametrize("form", [Form(), Form(queries=4, dim=128, windowed=True)])
def test_the_self_test_tells_right_from_wrong(form: Form) -> None:
    right, device = _dense(), torch.device("cpu")
    assert kernel_error(right, device, form, torch.float32) < 1e-5
    assert kernel_error(lambda *given: 1.5 * right(*given), device, form, torch.float32) > 0.02


def test_a_kernel_that_fails_or_computes_wrong_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[..., torch.Tensor] = _dense()

    def fails(*_: Any) -> torch.Tensor:
        raise AssertionError("only on sm_100")

    def deaf_to_windows(*given: Any) -> torch.Tensor:
        return right(*given[:-1], None)

    kernels = {"fails": lambda: fails, "deaf": lambda: deaf_to_windows, "right": lambda: right}
    monkeypatch.setattr(attention, "_KERNELS", kernels)
    attention._kernel.cache_clear()
    try:
        assert attention._kernel(torch.device("cpu"), Form(windowed=True)) is right
        assert attention._kernel(torch.device("cpu"), Form()) is deaf_to_windows
    finally:
        attention._kernel.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", [Form(), Form(4, 128), Form(1, 256), Form(2, 64, windowed=True)])
@pytest.mark.parametrize("name", sorted(_KERNELS))
def test_cuda_kernels_agree_with_fp32_math(name: str, form: Form) -> None:
    try:
        kernel = _KERNELS[name]()
    except ImportError:
        pytest.skip(f"{name} is not installed")
    assert kernel_error(kernel, torch.device("cuda"), form) < 2e-2
