"""Attention in plain sums: equal to torch's where both can do it, and to a loop where only it can."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer_node.engine.model.attention import AttentionLayout, _causal, packed_attention
from trainer_node.engine.model.kernels import plain_attention


def _inputs(tokens: int = 21) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(1, 4, tokens, 16), (1, 2, tokens, 16), (1, 2, tokens, 16)]
    return [torch.empty(shape).normal_(generator=random).requires_grad_() for shape in shapes]


def _gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), inputs))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("queries", [4, 512])  # rows of scores at a time
def test_without_cap_and_sinks_it_is_torch_attention(
    window: int | None, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_attention, "QUERIES", queries)
    inputs = _inputs()
    query, key, value = inputs
    found = plain_attention.plain_attention(query, key, value, 0.3, window)
    wanted = _causal(query, key, value, 0.3, window)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(_gradients(found, inputs), _gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sink", [None, 0.7])
def test_a_cap_bounds_each_score_and_a_sink_takes_weight(
    softcap: float | None, sink: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_attention, "QUERIES", 4)
    query, key, value = (tensor.detach() for tensor in _inputs())
    sinks = None if sink is None else torch.full((4,), sink)
    found = plain_attention.plain_attention(query, key, value, 0.5, None, softcap, sinks)
    for head, token in [(0, 0), (1, 7), (3, 20)]:
        weights = []
        for other in range(token + 1):
            score = 0.5 * float(query[0, head, token] @ key[0, head // 2, other])
            weights.append(math.exp(softcap * math.tanh(score / softcap) if softcap else score))
        total = sum(weights) + (0.0 if sink is None else math.exp(sink))
        wanted = sum(weight / total * value[0, head // 2, other] for other, weight in enumerate(weights))
        torch.testing.assert_close(found[0, head, token], wanted, atol=1e-5, rtol=1e-5)


def test_capped_documents_in_a_pack_are_as_alone() -> None:
    lengths, module = [9, 1, 11], torch.nn.Module()
    inputs = [tensor.detach() for tensor in _inputs()]
    layout = AttentionLayout(lengths, torch.tensor([0, 9, 10, 21], dtype=torch.int32), 21)
    packed, _ = packed_attention(module, *inputs, None, layout=layout, softcap=2.0)
    for start, length in zip([0, 9, 10], lengths, strict=True):
        pieces = [tensor[:, :, start : start + length] for tensor in inputs]
        alone, _ = packed_attention(module, *pieces, None, softcap=2.0)
        assert torch.equal(packed[:, start : start + length], alone)
