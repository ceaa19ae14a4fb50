"""The page of models lists what is tried, and no more is promised."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from bench.architectures.samples import SAMPLES
from bench.architectures.table import BEGIN, END, line_of, other_types, page_with, summary_of
from bench.architectures.trial import Trial
from shared.planning.architectures import ARCHITECTURES, facts_from_config

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
EXACT = Trial(
    "llama",
    "packed",
    "q_proj",
    gain={"lora": 1.0, "dense": 0.5},
    reported={"lora": 0.0, "dense": 0.001},
    kind={"lora": "adapter", "dense": "model"},
)
WRONG = Trial("mamba", "padded", cause="lora: nothing was learnt")


def test_each_architecture_has_a_row_with_its_batching() -> None:
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")[4:] if line]
    found = {row[0]: row[1] for row in rows}
    assert found == {sample.name: ARCHITECTURES[sample.model_type].value for sample in SAMPLES}


def test_the_page_is_made_of_trials() -> None:
    text = page_with(f"a\n{BEGIN}\nold\n{END}\nb\n", [EXACT, WRONG])
    assert text.startswith(f"a\n{BEGIN}\n\n| architecture |")
    assert "| llama | packed | q_proj | adapter | model |" in text
    assert "| mamba | padded | not exact: lora: nothing was learnt | - | - |" in text
    assert "| gpt2 | packed | not run | - | - |" in text
    assert text.endswith(f"\n{END}\nb\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="the page lacks"):
        page_with("# Models\n", [EXACT])


def test_what_is_accepted_and_not_exact_is_counted() -> None:
    figures = summary_of([EXACT, WRONG])
    assert (figures["architectures"], figures["exact"]) == (2, 1)
    assert (figures["lora"], figures["dense"]) == (1, 1)
    assert figures["accepted_but_refused_by_engine"] == 1
    assert figures["other_types"] == figures["refused_by_gateway"] > 50
    assert line_of(WRONG) == "WRONG   mamba                  lora: nothing was learnt"


def test_other_model_types_are_refused_and_the_engines_own_are_not() -> None:
    assert "llama" not in other_types()
    assert all(facts_from_config({"model_type": name}).refusal for name in other_types())
    assert not facts_from_config(LlamaConfig().to_dict()).refusal
