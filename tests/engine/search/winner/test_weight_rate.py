"""The learning rate from the size of the weights."""

import pytest
import torch
from msgspec.structs import replace

from shared.messages.offers import TaskType
from shared.planning.hardware import parse_hardware
from shared.planning.model_shape import shape_from_params
from shared.planning.plan import DataStats, Plan
from shared.planning.planner import make_plan
from shared.planning.profiles import resolve
from trainer_node.engine.search.winner.weight_rate import median_rms, rate_of, with_weight_rate

SIZED = resolve("winner_2026_06").sized(135_000_000, 1, pairs=False)
ROWS = DataStats(examples=100_000, tokens=10_000_000, label_tokens=5_000_000, max_length=400)


class Block(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.q_proj, self.down_proj = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))
        self.norm = torch.nn.LayerNorm(64)
        with torch.no_grad():
            self.q_proj.weight.fill_(scale)
            self.down_proj.weight.fill_(-scale)


def plan_of(profile: str) -> Plan:
    shape, hardware = shape_from_params(135_000_000, "llama"), parse_hardware("cpu-2x24GB")
    return make_plan(resolve(profile), shape, ROWS, hardware, 48 * 3600)


def test_larger_weights_and_smaller_models_get_higher_rates_within_bounds() -> None:
    # The rate that an entrant read off for Qwen2.5-1.5B is 6.7e-5.
    assert rate_of(3e-3, 0.03, 1_500_000_000, pairs=False) == pytest.approx(7.3e-5, rel=0.01)
    assert rate_of(3e-3, 0.06, 1_000_000_000, pairs=False) == pytest.approx(2 * 9e-5)
    assert rate_of(3e-3, 0.05, 3_000_000, pairs=False) == 1e-3
    assert rate_of(3e-3, 1e-6, 1_000_000_000, pairs=False) == 1e-6
    assert rate_of(2e-4, 1.0, 1_000_000_000, pairs=True) == 3e-5


def test_the_median_is_over_the_named_matrices() -> None:
    model = torch.nn.ModuleList([Block(0.1), Block(0.1), Block(9.0)])
    assert median_rms(model, {"q_proj", "down_proj"}) == pytest.approx(0.1)
    assert median_rms(model, {"2.q_proj"}) == pytest.approx(9.0)  # one layer's, where sizes differ


def test_the_plan_gets_the_rate_and_says_so_and_the_batchs_factor_stays() -> None:
    model = torch.nn.ModuleList([Block(0.02) for _ in range(100)])
    parameters = sum(weight.numel() for weight in model.parameters())
    plan = plan_of("winner_2026_06")
    halved = replace(plan, lr_dense=plan.lr_dense / 2)
    found = with_weight_rate(halved, SIZED, model, TaskType.INSTRUCT)
    share = plan.lr_dense / (SIZED.rate or 0.0)
    assert found.lr_dense == pytest.approx(share / 2 * rate_of(3e-3, 0.02, parameters, pairs=False))
    assert found.deviations[-1].what == "learning rate"
    assert "RMS 0.02" in found.deviations[-1].reason


def test_plans_without_the_rule_or_with_factors_stay_as_they_are() -> None:
    model = torch.nn.ModuleList([Block(0.02)])
    for profile in ("trl_default", "lora_r16"):
        plan = plan_of(profile)
        assert with_weight_rate(plan, resolve(profile), model, TaskType.INSTRUCT) == plan
    lora = replace(plan_of("lora_r16"), profile="winner_2026_06")
    assert with_weight_rate(lora, SIZED, model, TaskType.INSTRUCT) == lora


def test_pairs_are_never_above_the_table() -> None:
    sized = resolve("winner_2026_06").sized(135_000_000, 1, pairs=True)
    model = torch.nn.ModuleList([Block(5.0) for _ in range(10)])
    plan = replace(plan_of("winner_2026_06"), lr_dense=sized.rate or 0.0)
    assert with_weight_rate(plan, sized, model, TaskType.DPO).lr_dense == pytest.approx(1.35e-5)
