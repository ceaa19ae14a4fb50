from __future__ import annotations

import pytest

from shared.planning.model_family import FAMILIES, find_family
from shared.planning.profiles import family_of


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("llama-3.2-1b-instruct", "llama"),
        ("deepseek-r1-distill-qwen-7b", "qwen"),
        ("smollm2-135m", "smollm"),
        ("qwq-32b", "qwen"),
        ("gpt_neox", "gpt-neo"),
        ("yi-6b", "yi"),
        ("adoption", None),
        ("", None),
    ],
)
def test_the_first_family_in_the_text_is_found(text: str, family: str | None) -> None:
    assert find_family(text) == family


def test_a_learning_rate_knows_fewer_families_and_takes_them_from_anywhere_in_the_name() -> None:
    names = {family: family_of(f"meta/{family}-7b") for family in FAMILIES}
    assert {family for family, rate in names.items() if rate != "other"} == {"qwen", "llama", "smollm"}
    assert names["smollm"] == family_of("lmsys/Vicuna-7b") == family_of("meta-llama/Mistral") == "llama"
    assert family_of("Qwen/Llama") == family_of("someone/QwQ") == "qwen"
