"""Each library's attention is called as it wants to be: stand-ins with the libraries' own signatures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer_node.engine.model import attention
from trainer_node.engine.model.attention import Form, _dense, kernel_error
from trainer_node.engine.model.kernels.varlen_attention import (
    flash_attn,
    flash_attn_3,
    flash_attn_4,
    torch_varlen,
)

FORMS = [Form(), Form(8, 2, 32, windowed=True)]
CPU = torch.device("cpu")


def install(monkeypatch: pytest.MonkeyPatch, name: str, function: Any) -> None:
    for part in (name.partition(".")[0], name):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    sys.modules[name].flash_attn_varlen_func = function  # type: ignore[attr-defined]


def exact(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, reach: Any) -> Tensor:
    """What each library computes: causal, `reach` tokens to the left and none to the right."""
    assert longest == int(cu.diff().max())
    assert reach[1] in (0, -1, None)
    window = None if reach[0] in (-1, None) else reach[0] + 1
    return _dense()(q, k, v, cu, longest, scale, window)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hands_over", ["output", "output and sums"])
def test_flash_attn_3(form: Form, hands_over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 3's own function is in a module of another name; earlier builds returned a pair."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Any:
        assert causal
        out = exact(q, k, v, cu_seqlens_k, max_seqlen_k, softmax_scale or 0.0, window_size)
        return (out, torch.zeros(1)) if hands_over == "output and sums" else out

    install(monkeypatch, "flash_attn_interface", flash_attn_varlen_func)
    assert kernel_error(flash_attn_3(), CPU, form, torch.float32) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_flash_attn_4(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """4.0.0b36: an argument that the others lack stands before the borders, and a pair comes back."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int | None, int | None] = (None, None),
    ) -> tuple[Tensor, Tensor | None]:
        assert causal
        assert qv is None
        assert cu_seqlens_k is not None
        out = exact(q, k, v, cu_seqlens_k, max_seqlen_k or 0, softmax_scale or 0.0, window_size)
        return out, None

    install(monkeypatch, "flash_attn.cute", flash_attn_varlen_func)
    assert kernel_error(flash_attn_4(), CPU, form, torch.float32) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_flash_attn_2(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert causal
        assert dropout_p == 0.0
        return exact(q, k, v, cu_seqlens_k, max_seqlen_k, softmax_scale or 0.0, window_size)

    install(monkeypatch, "flash_attn.flash_attn_interface", flash_attn_varlen_func)
    assert kernel_error(flash_attn(), CPU, form, torch.float32) < 1e-5


@pytest.mark.parametrize("load", [flash_attn, flash_attn_3, flash_attn_4])
def test_one_that_is_not_installed_says_so(load: Any) -> None:
    with pytest.raises(ImportError):
        load()


def chosen(monkeypatch: pytest.MonkeyPatch, **kernels: Any) -> tuple[attention.Chosen, list[str]]:
    """Return what attends with these kernels and attention by document, and the warnings on the way."""
    warnings: list[str] = []
    monkeypatch.setattr(attention.log, "warning", lambda what, **named: warnings.append(named["cause"]))
    monkeypatch.setattr(attention, "_KERNELS", {**kernels, attention.PER_DOCUMENT: _dense})
    attention._kernel.cache_clear()
    try:
        return attention._kernel(CPU, Form()), warnings
    finally:
        attention._kernel.cache_clear()


def test_flash_attn_4_alone_is_no_broken_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wheel has a folder of the same name, without the older one's function."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    found, warnings = chosen(monkeypatch, old=flash_attn)
    assert (found.passed_over, warnings) == ("old: not installed", [])


@pytest.mark.parametrize(
    "broken",
    ["raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')", "import flash_attn_2_cuda"],
)
def test_a_flash_attn_that_is_broken_is_told(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built for another torch, or without a library of its own."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "flash_attn_interface.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    found, warnings = chosen(monkeypatch, old=flash_attn)
    sys.modules.pop("flash_attn", None)
    assert found.name == attention.PER_DOCUMENT
    assert len(warnings) == 1
    assert "flash_attn_2_cuda" in warnings[0]


def test_a_torch_whose_attention_knows_no_groups_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11's: it takes neither `enable_gqa` nor `window_size`."""

    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
    ) -> Tensor:
        raise AssertionError("it can't be called so")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    found, (warning,) = chosen(monkeypatch, torch=torch_varlen)
    assert found.name == attention.PER_DOCUMENT
    assert "unexpected keyword argument" in warning
