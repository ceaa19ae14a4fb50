"""Conversations as turns, tokens and labels, and what is said of roles that fit no message."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from bench.harness.dataset_types import SHAREGPT
from shared.errors import DataError
from shared.messages.offers import DatasetType, TaskType
from shared.messages.runs import Scorer
from tests.engine.data.conftest import END, document, ids, turn
from trainer_node.engine.data.conversations import advice, form_of, turns_of
from trainer_node.engine.data.examples import IGNORED, tokenize
from trainer_node.engine.data.job_rows import unmet
from trainer_node.engine.data.row_set import Row, RowSet
from trainer_node.engine.model.loading import load_tokenizer

CHAT = replace(SHAREGPT, chat_column="talk")
FORM = form_of(DatasetType(chat_user_reference="human", chat_assistant_reference="gpt"))
OTHERS = tuple(f"guest {number}" for number in range(13))


# --- turns


def row(*roles: str) -> Row:
    return {"conversations": [{"from": role, "value": "Hello"} for role in roles]}


def notices(rows: list[Row]) -> list[str]:
    return list(unmet(TaskType.CHAT, SHAREGPT, RowSet(rows=rows)))


def test_half_a_character_in_json_text_is_replaced(tokenizer: Any) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "cut \ud83d"}]
    rows: list[dict[str, Any]] = [{"conversations": json.dumps(talk)}]
    assert turns_of(rows[0], FORM) == [("user", "Hi"), ("assistant", "cut \ufffd")]
    examples, dropped = tokenize(rows, TaskType.CHAT, SHAREGPT, tokenizer, 256)
    assert (len(examples), dropped) == (1, {})


def test_a_field_without_a_value_gives_way_to_the_other_one() -> None:
    """Parquet files joined from both forms have all four fields in each message."""
    empty = dict.fromkeys(("from", "value"))
    talk = [{**empty, "role": role, "content": "Hello"} for role in ("human", "gpt")]
    assert turns_of({"conversations": talk}, FORM) == [("user", "Hello"), ("assistant", "Hello")]


def test_a_rare_role_is_not_said_to_be_missing() -> None:
    rows = [row(*OTHERS, "gpt")] * 2 + [row("human", "gpt")]
    assert notices(rows) == []
    assert advice([row("human"), *[row(*OTHERS)] * 2, row("gpt")], FORM) == ""
    assert notices([row("gpt")] * 1500 + [row("human", "gpt")]) == []


def test_a_role_that_is_missing_is_named_with_those_that_are_there() -> None:
    (notice,) = notices([row(*OTHERS, "gpt"), row("gpt")])
    assert notice.startswith("no message has the role 'human' (chat_user_reference); the roles are 'gpt', ")
    assert notice.endswith("and 2 more")
    assert "the roles are 'human': name two" in advice([row("human")], FORM)


# --- tokens and labels


def test_chat_scores_assistant_content_only(tokenizer: Any) -> None:
    talk = [turn("system", "Be kind."), turn("human", "Hello"), turn("gpt", "Good day"), turn("human", "Bye")]
    examples, _ = tokenize([{"talk": talk}], TaskType.CHAT, CHAT, tokenizer, 256)
    found, labels = document(examples)
    text = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nGood day<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )
    assert found == ids(tokenizer, text)
    scored = [label for label in labels if label != IGNORED]
    assert tokenizer.decode(scored).strip() == "Good day"


@pytest.mark.real_model
def test_the_end_of_a_turn_is_scored_where_it_is_the_tokenizers_own(smollm2: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2))
    talk = [turn("human", "Hi"), turn("gpt", "Good day"), turn("human", "Bye"), turn("gpt", "See you")]
    examples, _ = tokenize([{"talk": talk}], TaskType.CHAT, CHAT, tokenizer, 256)
    found, labels = document(examples)
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == (
        "Good day<|im_end|>See you<|im_end|>"
    )
    assert tokenizer.decode(found).count("<|im_end|>") == 4
    for name in ("tokenizer_default", "llama3"):  # a name goes by the model's own template
        default = DatasetType(
            **{**{f: getattr(CHAT, f) for f in CHAT.__struct_fields__}, "chat_template": name}
        )
        own, _ = tokenize([{"talk": talk}], TaskType.CHAT, default, tokenizer, 256)
        assert tokenizer.decode(document(own)[0]).startswith("<|im_start|>system")  # its template adds one


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"talk": None}, "column 'talk' is missing"),
        ({"talk": "hello"}, "column 'talk' is not a list of messages"),
        ({"talk": []}, "column 'talk' is empty"),
        ({"talk": [{"from": "gpt"}]}, "a message without text in 'from' or 'value'"),
        ({"talk": [turn("human", "alone")]}, "no message of the role 'gpt'"),
    ],
)
def test_bad_conversations(tokenizer: Any, row: dict[str, Any], reason: str) -> None:
    good = {"talk": [turn("human", "Hello"), turn("gpt", "Good day")]}
    examples, dropped = tokenize([good, row], TaskType.CHAT, CHAT, tokenizer, 256)
    assert len(examples) == 1
    assert dropped == {reason: 1}


def test_an_unknown_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"chat template .* can't be used"):
        tokenize([{"conversations": []}], TaskType.CHAT, DatasetType(chat_template="{{ x }}"), tokenizer, 256)


def test_rows_that_the_models_own_template_refuses_are_counted(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}"
        "{{ raise_exception('no system please') }}{% endif %}{{ message.content }}{% endfor %}"
    )
    kind = replace(CHAT, chat_template="tokenizer_default")
    good = {"talk": [turn("human", "Hello"), turn("gpt", "Good day")]}
    bad = {"talk": [turn("system", "Be kind."), *good["talk"]]}
    examples, dropped = tokenize([good, bad], TaskType.CHAT, kind, own, 256)
    assert len(examples) == 1
    assert dropped == {"the model's chat template refuses it: no system please": 1}


# Writes an empty thought before the last answer, and asks for that answer's place where it may be told it.
THINKS = (
    "{%- for m in messages %}{{ m['role'] }}: "
    "{%- set last = real_last_index if real_last_index is defined else messages | length - 1 %}"
    "{% if loop.index0 == last %}(think){% endif %}{{ m['content'] }}</s>{% endfor %}"
)


@pytest.mark.parametrize(("scorer", "told"), [(Scorer.CONTESTS, True), (Scorer.OFFERS, False)])
def test_contests_tell_a_template_which_turn_is_the_last(tokenizer: Any, scorer: Scorer, told: bool) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = THINKS
    kind = replace(CHAT, chat_template="tokenizer_default")
    row = {
        "talk": [turn("human", "Hi"), turn("gpt", "Good day"), turn("human", "Bye"), turn("gpt", "So long")]
    }
    examples, _ = tokenize([row], TaskType.CHAT, kind, own, 256, scorer=scorer)
    labels = [label for label in document(examples, 0)[1] if label != IGNORED]
    wanted = [*ids(own, "Good day"), END, *ids(own, "So long"), END]
    assert (labels == wanted) is told


def test_a_fallback_is_for_models_without_a_template(tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    row = {"talk": [turn("human", "Hi"), turn("gpt", "Good day")]}

    def encoded(template: str) -> tuple[list[int], list[int]]:
        kind = replace(CHAT, chat_template=template)
        return document(tokenize([row], TaskType.CHAT, kind, own, 256)[0], 0)

    own.chat_template = THINKS
    assert encoded("tokenizer_default_fallback_chatml") == encoded("tokenizer_default")
    own.chat_template = None
    assert encoded("tokenizer_default_fallback_chatml") == encoded("chatml")
    with pytest.raises(DataError, match="can't be used"):
        encoded("tokenizer_default_fallback_llama3")
