"""Instructions, completions and preference pairs as tokens and labels, as the scorer makes them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace
from tokenizers.processors import TemplateProcessing

from bench.harness.dataset_types import SHAREGPT
from shared.errors import DataError
from shared.messages.offers import DatasetType, TaskType
from shared.messages.runs import Scorer
from tests.engine.data.conftest import END, START, document, ids, turn
from trainer_node.engine.data.examples import IGNORED, Examples, longest_row, tokenize

INSTRUCT = DatasetType(field_instruction="ask", field_output="say")
CHAT = replace(SHAREGPT, chat_column="talk")
DPO = DatasetType(field_prompt="p", field_chosen="c", field_rejected="r")


# --- instruct and completion


@pytest.mark.parametrize(
    ("columns", "row", "prompt"),
    [
        ({}, {}, "Define it."),
        ({"field_input": "more"}, {"more": "a cat"}, "Define it. a cat"),
        ({"field_input": "more"}, {"more": ""}, "Define it."),
        ({"field_input": "more"}, {"more": None}, "Define it."),
        ({"field_system": "sys"}, {"sys": "Be brief."}, "Be brief.Define it."),
        ({"system_prompt": "Be kind."}, {}, "Be kind.Define it."),
        ({"system_prompt": "Be kind.", "system_format": "[{system}] "}, {}, "[Be kind.] Define it."),
        ({}, {"system": "Be brief."}, "Be brief.Define it."),  # the scorer's default column
        ({"field_system": "sys", "system_prompt": "Be kind."}, {"sys": ""}, "Define it."),
        ({"format": "Q: {instruction} ({input})"}, {"input": "a cat"}, "Q: Define it. (a cat)"),
        ({"no_input_format": "Q: {instruction}"}, {}, "Q: Define it."),
    ],
)
def test_instruct_prompts(tokenizer: Any, columns: dict[str, str], row: dict[str, Any], prompt: str) -> None:
    kind = DatasetType(field_instruction="ask", field_output="say", **columns)
    examples, dropped = tokenize(
        [{"ask": "Define it.", "say": "an animal", **row}], TaskType.INSTRUCT, kind, tokenizer, 256
    )
    asked, said = [START, *ids(tokenizer, prompt)], [*ids(tokenizer, "an animal"), END]
    assert document(examples) == (asked + said, [IGNORED] * len(asked) + said)
    assert dropped == {}


def test_prompt_and_response_are_cut_each_and_then_the_row_is_too_long(tokenizer: Any) -> None:
    rows = [
        {"ask": "word " * 100, "say": "yes"},
        {"ask": "hm", "say": "word " * 100},
        {"ask": "hm", "say": "yes"},
    ]
    said: list[str] = []
    examples, dropped = tokenize(rows, TaskType.INSTRUCT, INSTRUCT, tokenizer, 16, tick=said.append)
    assert (len(examples), said) == (1, ["3 of 3 rows tokenised"])
    assert dropped == {"longer than 16 tokens": 2}


def test_bad_rows_are_counted_by_reason(tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"ask": "one", "say": "two"},
        {"ask": "one", "say": ""},
        {"ask": "one", "say": None},
        {"ask": "one"},
        {"ask": [7], "say": "two"},
    ]
    examples, dropped = tokenize(rows, TaskType.INSTRUCT, INSTRUCT, tokenizer, 256)
    assert len(examples) == 1
    assert dropped == {
        "column 'say' is empty": 1,
        "column 'say' is missing": 2,
        "column 'ask' is not text": 1,
    }


def test_an_empty_prompt_leaves_the_first_response_token_unscored(tokenizer: Any) -> None:
    examples, _ = tokenize([{"ask": "", "say": "an animal"}], TaskType.INSTRUCT, INSTRUCT, tokenizer, 256)
    said = [*ids(tokenizer, "an animal"), END]
    assert document(examples) == (said, [IGNORED, *said[1:]])


def test_completion_is_scored_whole_and_cut_into_chunks(tokenizer: Any) -> None:
    text = "all the words of this text are scored " * 3
    examples, _ = tokenize(
        [{"text": text}], TaskType.INSTRUCT, DatasetType(field_instruction="text"), tokenizer, 16
    )
    whole = [START, *ids(tokenizer, text), END]
    found = [document(examples, index) for index in range(len(examples))]
    assert [token for chunk, _ in found for token in chunk] == whole
    assert all(len(chunk) == 16 for chunk, _ in found[:-1])
    assert all(labels == [IGNORED, *chunk[1:]] for chunk, labels in found)


@pytest.mark.parametrize(
    "form",
    ["{instruction.__class__}", "{instruction:>99999999}", "{instruction!r}", "{other}", "{0}", "{", "}"],
)
def test_formats_reach_no_further_than_text(tokenizer: Any, form: str) -> None:
    kind = DatasetType(field_instruction="ask", field_output="say", no_input_format=form)
    with pytest.raises(DataError, match="format"):
        tokenize([{"ask": "a", "say": "b"}], TaskType.INSTRUCT, kind, tokenizer, 256)


# --- preferences


def test_pairs_share_the_prompt_and_end(tokenizer: Any) -> None:
    examples, _ = tokenize([{"p": "Say", "c": "yes", "r": "no way"}], TaskType.DPO, DPO, tokenizer, 256)
    prompt = ids(tokenizer, "Say")
    for index, answer in enumerate(("yes", "no way")):
        said = [*ids(tokenizer, answer), END]
        assert document(examples, index) == (prompt + said, [IGNORED] * len(prompt) + said)
    assert len(examples) == 1
    assert examples.lengths.tolist() == [len(examples.ids)]


def contest_pairs(tokenizer: Any, length: int, **row: str) -> tuple[Examples, dict[str, int]]:
    return tokenize([row], TaskType.DPO, DPO, tokenizer, length, scorer=Scorer.CONTESTS)


def test_contests_tokenise_prompt_and_completion_as_one_text(tokenizer: Any) -> None:
    examples, _ = contest_pairs(tokenizer, 256, p="Say", c=" yes", r="no way</s>")
    prompt = tokenizer("Say")["input_ids"]
    for index, text in enumerate(("Say yes</s>", "Sayno way</s>")):  # an end token that is there stays one
        whole = tokenizer(text)["input_ids"]
        assert whole[-1] == END
        labels = [IGNORED] * len(prompt) + whole[len(prompt) :]
        assert document(examples, index) == (prompt + whole[len(prompt) :], labels)


def test_contests_keep_the_start_token(tokenizer: Any) -> None:
    started = copy.deepcopy(tokenizer)
    started.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", START)]
    )
    examples, _ = contest_pairs(started, 256, p="Say", c=" yes", r=" no")
    assert [document(examples, index)[0][0] for index in (0, 1)] == [START, START]
    offers, _ = tokenize([{"p": "Say", "c": " yes", "r": " no"}], TaskType.DPO, DPO, started, 256)
    assert document(offers, 0)[0][0] != START


def test_contests_keep_the_start_of_long_pairs(tokenizer: Any) -> None:
    examples, dropped = contest_pairs(tokenizer, 1500, p="word " * 200, c="yes " * 3000, r="no")
    assert dropped == {}
    prompt = tokenizer("word " * 200)["input_ids"]
    whole = tokenizer("word " * 200 + "yes " * 3000)["input_ids"]
    kept = (prompt + whole[len(prompt) :])[:1500]
    assert kept[-1] != END
    assert document(examples, 0) == (kept, [IGNORED] * len(prompt) + kept[len(prompt) :])
    assert document(examples, 1)[0][-1] == END


def test_contests_score_no_completion_that_is_cut_away(tokenizer: Any) -> None:
    rows = [{"p": "word " * 300, "c": "yes", "r": "no"}, {"p": "Say", "c": "yes", "r": "no"}]
    examples, dropped = tokenize(rows, TaskType.DPO, DPO, tokenizer, 64, scorer=Scorer.CONTESTS)
    assert len(examples) == 1
    assert dropped == {"nothing to score": 1}


@pytest.mark.parametrize(
    ("task_type", "scorer", "positions", "length"),
    [
        (TaskType.DPO, Scorer.CONTESTS, 32768, 32768),
        (TaskType.DPO, Scorer.CONTESTS, None, 8192),
        (TaskType.DPO, Scorer.OFFERS, 32768, 4096),
        (TaskType.INSTRUCT, Scorer.CONTESTS, 32768, 4096),
        (TaskType.CHAT, Scorer.CONTESTS, 2048, 1024),
    ],
)
def test_the_longest_row(task_type: TaskType, scorer: Scorer, positions: int | None, length: int) -> None:
    assert longest_row(SimpleNamespace(max_position_embeddings=positions), task_type, scorer) == length


def test_long_pairs_keep_their_end(tokenizer: Any) -> None:
    examples, dropped = tokenize(
        [{"p": "word " * 900, "c": "yes " * 900, "r": "no"}], TaskType.DPO, DPO, tokenizer, 4096
    )
    assert dropped == {}
    chosen, rejected = document(examples, 0), document(examples, 1)
    assert len(chosen[0]) == 1024
    assert chosen[0][-1] == END
    assert len(rejected[0]) == 512 + len(ids(tokenizer, "no")) + 1


# --- all kinds


@pytest.mark.parametrize(
    ("kind", "columns", "row"),
    [
        (TaskType.INSTRUCT, INSTRUCT, {"ask": "Say", "say": "yes"}),
        (TaskType.INSTRUCT, DatasetType(field_instruction="ask"), {"ask": "Say yes"}),
        (TaskType.CHAT, CHAT, {"talk": [turn("human", "Hello"), turn("gpt", "Good day")]}),
        (TaskType.DPO, DPO, {"p": "Say", "c": "yes", "r": "no way"}),
    ],
)
def test_a_model_without_an_end_token_gets_none(
    tokenizer: Any, kind: TaskType, columns: DatasetType, row: dict[str, Any]
) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert endless.eos_token_id is None
    with_end, _ = tokenize([row], kind, columns, tokenizer, 256)
    without, dropped = tokenize([row], kind, columns, endless, 256)
    assert not dropped
    ended = 0 if kind is TaskType.CHAT else with_end.group
    assert len(without.ids) == len(with_end.ids) - ended
    assert tokenizer.eos_token_id not in without.ids.tolist()
