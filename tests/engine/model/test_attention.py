"""Packed attention: each document as if it were alone, on the CPU bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shared.errors import EngineError
from trainer_node.engine.data.examples import Examples
from trainer_node.engine.data.packing import Batch, collate
from trainer_node.engine.model import attention
from trainer_node.engine.model.attention import (
    _KERNELS,
    AttentionLayout,
    Chosen,
    Form,
    _dense,
    attention_kwargs,
    choose_kernels,
    forms_of,
    install,
    kernel_error,
    max_documents,
    packed_attention,
    slower_because,
    widened,
)
from trainer_node.engine.model.loading import load_config, load_model

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


@pytest.mark.parametrize("form", [Form(), Form(8, 2, 128, windowed=True)])
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
        assert attention._kernel(torch.device("cpu"), Form(windowed=True)).run is right
        assert attention._kernel(torch.device("cpu"), Form()).run is deaf_to_windows
    finally:
        attention._kernel.cache_clear()


def _assert_passed_over(
    wrong: Callable[..., torch.Tensor], right: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right kernel is taken in place of the wrong one, which is named."""
    monkeypatch.setattr(attention, "_KERNELS", {"wrong": lambda: wrong, "right": lambda: right})
    attention._kernel.cache_clear()
    try:
        found = attention._kernel(torch.device("cpu"), Form())
    finally:
        attention._kernel.cache_clear()
    assert found.run is right
    assert found.passed_over.startswith("wrong: off by ")


@pytest.mark.parametrize("where", ["between", "at the end"])
def test_a_kernel_that_is_wrong_for_empty_documents_alone_is_passed_over(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded packs have them, and a replay is compared with the same kernel's own answer."""
    right: Callable[..., torch.Tensor] = _dense()

    def confused(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, *others: Any) -> Tensor:
        empty = cu.diff() == 0
        last = int((~empty).nonzero().max())
        wrong = empty[last:].any() if where == "at the end" else empty[:last].any()
        return right(q, k, v, cu, *others) * (0.5 if wrong else 1.0)

    _assert_passed_over(confused, right, monkeypatch)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_kernel_that_gives_no_number_is_passed_over_by_name(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Callable[..., torch.Tensor] = _dense()
    broken: Callable[..., torch.Tensor] = lambda *given: right(*given) * factor  # noqa: E731
    _assert_passed_over(broken, right, monkeypatch)
    monkeypatch.setattr(attention, "_dense", lambda: broken)
    with pytest.raises(EngineError, match="attention computes wrong"):
        attention.check_kernels(torch.device("cpu"), [Form()])


def test_documents_attended_one_by_one_may_be_empty() -> None:
    """Only documents that have tokens reach the attention of one document."""
    borders = torch.tensor([0, 9, 9, 10, 40, 44, 44, 44], dtype=torch.int32)
    query, key, value = (torch.randn(44, 2, 16) for _ in range(3))
    found = _dense()(query, key, value, borders, 30, 0.25, None)
    whole = torch.tensor([0, 9, 10, 40, 44], dtype=torch.int32)
    assert torch.equal(found, _dense()(query, key, value, whole, 30, 0.25, None))
    assert attention.lengths_of(borders) == LENGTHS


def test_people_are_told_why_documents_are_attended_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn")

    def broken() -> Any:
        raise RuntimeError("no kernel image is available\nfor execution")

    kernels = {"flash-attn": missing, "torch-varlen": broken, "sdpa-per-document": _dense}
    monkeypatch.setattr(attention, "_KERNELS", kernels)
    attention._kernel.cache_clear()
    try:
        told = slower_because([attention._kernel(torch.device("cpu"), Form())])
    finally:
        attention._kernel.cache_clear()
    assert told is not None
    assert told.startswith("training is slower")
    assert told.endswith("(flash-attn: not installed; torch-varlen: no kernel image is available)")
    assert slower_because([Chosen("flash-attn", _dense())]) is None


@pytest.mark.parametrize("around", ["recomputed", "scored", "autocast"])
def test_the_self_test_doesn_t_depend_on_where_attention_is_first_called(
    around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_KERNELS", {"right": _dense})
    attention._kernel.cache_clear()
    chosen: list[Any] = []

    def layer(x: Tensor) -> Tensor:
        if not chosen:
            chosen.append(attention._kernel(torch.device("cpu"), Form()))
        return x.sin().exp()

    try:
        if around == "recomputed":  # a resumed FSDP2 run calls attention here first
            x = torch.ones(3, requires_grad=True)
            checkpoint(layer, x, use_reentrant=False).sum().backward()
            torch.testing.assert_close(x.grad, torch.ones(3).sin().exp() * torch.ones(3).cos())
        elif around == "scored":
            with torch.inference_mode():
                layer(torch.ones(3))
        else:
            with torch.autocast("cpu"):
                layer(torch.ones(3))
        assert len(chosen) == 1
    finally:
        attention._kernel.cache_clear()


@pytest.mark.parametrize(("last_rows", "right"), [(0, True), (170, False)])
def test_an_error_in_a_later_tile_is_found(last_rows: int, right: bool) -> None:
    exact: Callable[..., Tensor] = _dense()

    def kernel(*given: Any) -> Tensor:
        out = exact(*given)
        rows = torch.arange(len(out))[:, None, None]
        return out * (rows < len(out) - last_rows)

    assert (kernel_error(kernel, torch.device("cpu"), Form(), torch.float32) < 1e-5) == right


def test_a_window_that_is_rounded_to_tiles_is_found() -> None:
    exact: Callable[..., Tensor] = _dense()

    def whole_tiles(*given: Any) -> Tensor:
        *others, window = given
        return exact(*others, -(-window // 128) * 128)

    assert kernel_error(whole_tiles, torch.device("cpu"), Form(windowed=True), torch.float32) > 0.02


def test_the_forms_are_those_of_the_model(tiny_model: Path) -> None:
    config = load_config(str(tiny_model))
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    dim = config.hidden_size // heads
    assert forms_of(config) == [Form(heads, groups, dim)]
    config.sliding_window = 512
    assert forms_of(config) == [Form(heads, groups, dim), Form(heads, groups, dim, windowed=True)]


def test_kernels_are_chosen_when_the_model_is_loaded(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[torch.device, Form]] = []
    chosen = Chosen("torch-varlen", _dense())

    def choose(device: torch.device, form: Form) -> Chosen:
        tried.append((device, form))
        return chosen

    monkeypatch.setattr(attention, "_kernel", choose)
    config = load_config(str(tiny_model))
    assert choose_kernels(config, torch.device("cpu")) == []
    assert tried == []
    assert choose_kernels(config, torch.device("cuda", 1)) == [chosen]
    assert tried == [(torch.device("cuda", 1), form) for form in forms_of(config)]


def test_only_narrower_values_are_copied() -> None:
    value = torch.randn(1, 2, 5, 16)
    assert widened(value, 16).data_ptr() == value.data_ptr()
    assert torch.equal(widened(value, 24)[..., :16], value)
    assert widened(value, 24).shape == (1, 2, 5, 24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", [Form(9, 3), Form(32, 8, 128), Form(4, 4, 256), Form(14, 2, windowed=True)])
@pytest.mark.parametrize("name", sorted(_KERNELS))
def test_cuda_kernels_agree_with_fp32_math(name: str, form: Form) -> None:
    try:
        kernel = _KERNELS[name]()
    except ImportError:
        pytest.skip(f"{name} is not installed")
    assert kernel_error(kernel, torch.device("cuda"), form) < 2e-2
