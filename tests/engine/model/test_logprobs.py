"""Label log-probabilities and their gradients against plain log_softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer_node.engine.model.logprobs import label_logprobs


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=random).to(dtype).requires_grad_()
    head = torch.randn(101, 16, generator=random).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, 101, (37,), generator=random), torch.rand(37, generator=random)


def naive(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ head.T).float(), 1).gather(1, labels[:, None]).squeeze(1)


@pytest.mark.parametrize("chunk", [1, 8, 37, 64])
@pytest.mark.parametrize("head_learns", [False, True])
def test_values_and_gradients_equal_the_naive_way(chunk: int, head_learns: bool) -> None:
    hidden, head, labels, weights = inputs()
    head.requires_grad_(head_learns)
    wanted = naive(hidden, head, labels)
    (wanted @ weights).backward()
    gradients = hidden.grad, head.grad
    hidden.grad = head.grad = None
    found = label_logprobs(hidden, head, labels, chunk)
    (found @ weights).backward()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(hidden.grad, gradients[0], atol=1e-5, rtol=1e-5)
    assert (head.grad is None) == (not head_learns)
    if head_learns:
        torch.testing.assert_close(head.grad, gradients[1], atol=1e-5, rtol=1e-5)


def test_only_the_head_learns() -> None:
    hidden, head, labels, weights = inputs()
    (naive(hidden, head, labels) @ weights).backward()
    wanted = head.grad
    head.grad = None
    (label_logprobs(hidden.detach(), head, labels, 8) @ weights).backward()
    torch.testing.assert_close(head.grad, wanted, atol=1e-5, rtol=1e-5)


def test_the_softmax_is_fp32_where_products_are_bf16() -> None:
    hidden, head, labels, _ = inputs(torch.bfloat16)
    assert label_logprobs(hidden, head, labels).dtype == torch.float32
    torch.testing.assert_close(label_logprobs(hidden, head, labels), naive(hidden, head, labels))


def test_autocast_decides_the_product() -> None:
    hidden, head, labels, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        found = label_logprobs(hidden, head, labels)
    torch.testing.assert_close(found, naive(hidden.bfloat16(), head.bfloat16(), labels))
    assert not torch.equal(found, label_logprobs(hidden, head, labels))


def test_under_autocast_a_head_s_gradient_is_of_its_own_dtype_in_chunks_or_not() -> None:
    hidden, head, labels, weights = inputs()
    (naive(hidden, head, labels) @ weights).backward()
    wanted = head.grad
    assert wanted is not None
    for chunk in (8, 64):
        head.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            (label_logprobs(hidden, head, labels, chunk) @ weights).backward()
        assert head.grad is not None
        assert head.grad.dtype == torch.float32
        assert (head.grad - wanted).norm() < 0.02 * wanted.norm()


def test_no_labels() -> None:
    hidden, head, labels, _ = inputs()
    found = label_logprobs(hidden[:0], head, labels[:0])
    assert found.shape == (0,)
    found.sum().backward()
    assert torch.equal(head.grad, torch.zeros_like(head))
