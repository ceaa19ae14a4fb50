import pytest

from shared.errors import SettingsError
from shared.planning.model_name import FAMILIES
from shared.planning.profiles import (
    PROFILES,
    dense_rate,
    family_of,
    lora_rate,
    pair_share,
    resolve,
)


def test_maximum_accuracy_is_the_house_profile_to_the_letter() -> None:
    recipe = resolve("maximum_accuracy")
    assert (recipe.rank, recipe.alpha, recipe.dropout) == (8192, 2048, 0.05)
    assert recipe.targets == ()
    assert (recipe.device_batch, recipe.accumulation, recipe.eval_batch) == (128, 1, 64)
    assert recipe.max_length == 8192
    assert recipe.bf16
    assert recipe.flash_attention
    assert recipe.activation_checkpointing
    assert recipe.compile
    assert recipe.ddp_bucket_mb == 200


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve("maximum_speed")
    for profile in PROFILES:
        assert profile in str(caught.value)
    assert "maximum_speed" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen"),
        ("qwen2", "qwen"),
        ("meta-llama/Llama-3.1-8B", "llama"),
        ("HuggingFaceTB/SmolLM2-135M", "llama"),
        ("mistral", "other"),
        ("", "other"),
    ],
)
def test_families(name: str, family: str) -> None:
    assert family_of(name) == family


def test_rates_follow_the_published_rule() -> None:
    assert lora_rate("llama", 2000, 32.0) == pytest.approx(5e-4)
    assert lora_rate("llama", 4096, 32.0) == pytest.approx(5e-4 * (2000 / 4096) ** 0.78)
    assert lora_rate("qwen", 4096, 32.0) == pytest.approx(5e-4 * (2000 / 4096) ** 0.08)
    assert lora_rate("other", 576, 32.0) == pytest.approx(5e-4 * (2000 / 576) ** 0.4)
    for family in ("llama", "qwen", "other"):
        assert lora_rate(family, 160, 32.0) == lora_rate("llama", 576, 32.0)
    assert dense_rate("llama", 2000) == pytest.approx(5e-5)


def test_small_models_of_all_families_want_the_same_dense_rate() -> None:
    for family in ("llama", "qwen", "other"):
        assert dense_rate(family, 160) == pytest.approx(5e-5 * (2000 / 160) ** 0.78)
        assert dense_rate(family, 1999) == pytest.approx(dense_rate(family, 2000), rel=1e-3)
    assert dense_rate("qwen", 3584) == pytest.approx(5e-5 * (2000 / 3584) ** 0.08)


def test_alpha_2048_asks_for_an_eighth_of_the_rate_of_alpha_32() -> None:
    assert lora_rate("llama", 4096, 2048.0) == pytest.approx(lora_rate("llama", 4096, 32.0) / 8)


def test_preference_pairs_take_the_full_rate_in_few_steps_and_a_tenth_in_many() -> None:
    assert [pair_share(steps) for steps in (0, 40, 160, 4000, 10**6)] == [1.0, 1.0, 0.5, 0.1, 0.1]


def test_a_learning_rate_knows_fewer_families_and_takes_them_from_anywhere_in_the_name() -> None:
    names = {family: family_of(f"meta/{family}-7b") for family in FAMILIES}
    assert {family for family, rate in names.items() if rate != "other"} == {"qwen", "llama", "smollm"}
    assert names["smollm"] == family_of("lmsys/Vicuna-7b") == family_of("meta-llama/Mistral") == "llama"
    assert family_of("Qwen/Llama") == family_of("someone/QwQ") == "qwen"
