"""Rows to tokens and labels as the scorer makes them; bad rows counted, bad files named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from msgspec.structs import replace

from shared.errors import DataError
from shared.messages import DatasetType, FileFormat, TaskType
from trainer_node.engine.data.examples import IGNORED, Examples, hold_out, read_rows, scored_length, tokenize
from trainer_node.engine.model.loading import load_tokenizer

INSTRUCT = DatasetType(field_instruction="ask", field_output="say")
CHAT = DatasetType(
    chat_template="chatml",
    chat_column="talk",
    chat_role_field="from",
    chat_content_field="value",
    chat_user_reference="human",
    chat_assistant_reference="gpt",
)
DPO = DatasetType(field_prompt="p", field_chosen="c", field_rejected="r")
START, END = 0, 1


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def document(examples: Examples, index: int = 0) -> tuple[list[int], list[int]]:
    span = slice(examples.offsets[index], examples.offsets[index + 1])
    return examples.ids[span].tolist(), examples.labels[span].tolist()


def turn(role: str, text: str) -> dict[str, str]:
    return {"from": role, "value": text}


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


# --- chat


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


def test_the_highest_token_of_each_example() -> None:
    offsets = np.array([0, 2, 3, 5, 6], dtype=np.int64)
    ids = np.array([5, 1, 9, 2, 3, 0], dtype=np.int32)
    assert Examples(ids, ids, offsets).highest.tolist() == [5, 9, 3, 0]
    assert Examples(ids, ids, offsets, group=2).highest.tolist() == [9, 3]
    assert Examples(ids[:0], ids[:0], offsets[:1]).highest.tolist() == []


# --- preferences


def test_pairs_share_the_prompt_and_end(tokenizer: Any) -> None:
    examples, _ = tokenize([{"p": "Say", "c": "yes", "r": "no way"}], TaskType.DPO, DPO, tokenizer, 256)
    prompt = ids(tokenizer, "Say")
    for index, answer in enumerate(("yes", "no way")):
        said = [*ids(tokenizer, answer), END]
        assert document(examples, index) == (prompt + said, [IGNORED] * len(prompt) + said)
    assert len(examples) == 1
    assert examples.lengths.tolist() == [len(examples.ids)]


def test_long_pairs_keep_their_end(tokenizer: Any) -> None:
    examples, dropped = tokenize(
        [{"p": "word " * 900, "c": "yes " * 900, "r": "no"}], TaskType.DPO, DPO, tokenizer, 4096
    )
    assert dropped == {}
    chosen, rejected = document(examples, 0), document(examples, 1)
    assert len(chosen[0]) == 1024
    assert chosen[0][-1] == END
    assert len(rejected[0]) == 512 + len(ids(tokenizer, "no")) + 1


# --- files


def test_the_same_rows_from_every_format(tmp_path: Path) -> None:
    rows = [{"ask": "one, two\n", "say": 'a "b"'}, {"ask": "\u00e4", "say": "c"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "a.csv").write_text('\ufeffask,say\r\n"one, two\n","a ""b"""\r\n\u00e4,c\r\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for kind in (FileFormat.JSON, FileFormat.JSONL, FileFormat.CSV, FileFormat.PARQUET):
        assert read_rows(str(tmp_path / f"a.{kind}"), kind, allow_private_urls=False).rows == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "a.json holds no rows"),
        ("a.json", b"[]", "a.json holds no rows"),
        ("a.json", b'[{"a": 1}', "a.json is not valid JSON"),
        ("a.json", b"[" * 100_000, "a.json is not usable: it is nested too deeply"),
        ("a.json", b"[5, 6]", "a.json, row 1: a row must be a JSON object"),
        ("a.jsonl", b'{"a": \n{"a": \n', "a.jsonl is not valid JSON: it ends inside row 1"),
        ("a.csv", b"", "a.csv holds no rows"),
        ("a.csv", b"a,b\n\xff\xfe,1\n", "a.csv is not UTF-8, nor text in a western encoding"),
        ("a.parquet", b"PAR1 not really", "a.parquet is not a readable Parquet file"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name), FileFormat(name[2:]), allow_private_urls=False)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        read_rows(str(tmp_path / "none.json"), FileFormat.JSON, allow_private_urls=False)
    with pytest.raises(DataError, match="can't read"):
        read_rows(str(tmp_path), FileFormat.JSON, allow_private_urls=False)


def test_a_missing_column_is_named_with_those_that_are_there(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"d.json: no row has the column 'say'; .* row 1 are 'ask', 'answer'"):
        tokenize([{"ask": "a", "answer": "b"}], TaskType.INSTRUCT, INSTRUCT, tokenizer, 256, source="d.json")
    url = "https://h.example/d.json?X-Amz-Signature=secret"  # the signature must not show
    with pytest.raises(DataError, match=r"^https://h\.example/d\.json: no row"):
        tokenize([{"ask": "a"}], TaskType.INSTRUCT, INSTRUCT, tokenizer, 256, source=url)
    with pytest.raises(DataError, match="names no column: field_instruction"):
        tokenize([{"ask": "a"}], TaskType.INSTRUCT, DatasetType(field_output="say"), tokenizer, 256)


def test_no_usable_row_says_why(tokenizer: Any) -> None:
    rows = [{"ask": "one", "say": ""}, {"ask": "one", "say": "word " * 100}]
    with pytest.raises(DataError, match=r"no usable row among 2: .*empty \(1, first row 1\); longer than 16"):
        tokenize(rows, TaskType.INSTRUCT, INSTRUCT, tokenizer, 16)


# --- Examples


@pytest.mark.parametrize(
    ("positions", "length"), [(512, 256), (2047, 1024), (8191, 4096), (8192, 4096), (131072, 4096)]
)
def test_scored_length(positions: int, length: int) -> None:
    assert scored_length(SimpleNamespace(max_position_embeddings=positions)) == length


@pytest.mark.parametrize("group", [1, 2])
def test_take_keeps_examples_whole(make_examples: Callable[..., Examples], group: int) -> None:
    examples = make_examples([3, 5, 2, 7, 4, 6], group=group)
    taken = examples.take([2, 0])
    assert len(taken) == 2
    assert taken.lengths.tolist() == [examples.lengths[2], examples.lengths[0]]
    for place, source in ((0, 2), (1, 0)):
        for part in range(group):
            assert document(taken, place * group + part) == document(examples, source * group + part)
    assert taken.label_tokens < examples.label_tokens
    assert len(examples.take([])) == 0


def test_the_fingerprint_is_that_of_the_content(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([3, 5, 2])
    assert (
        examples.fingerprint()
        == make_examples([3, 5, 2]).fingerprint()
        == examples.take([0, 1, 2]).fingerprint()
    )
    others = [make_examples([3, 5, 2], seed=1), make_examples([3, 2, 5]), examples.take([1, 0, 2])]
    assert len({examples.fingerprint(), *(other.fingerprint() for other in others)}) == 4


@pytest.mark.parametrize(("n", "dev"), [(2, 1), (10, 2), (100, 20), (2000, 400), (5000, 400), (20_000, 606)])
def test_hold_out_size(make_examples: Callable[..., Examples], n: int, dev: int) -> None:
    examples = make_examples([8] * n)
    train, held = hold_out(examples, seed=0)
    assert (len(train), len(held)) == (n - dev, dev)
    assert hold_out(examples, seed=0)[1].fingerprint() == held.fingerprint()
    if n > 2:
        assert hold_out(examples, seed=1)[1].fingerprint() != held.fingerprint()


def test_equal_rows_stay_on_one_side(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([8] * 60).take(np.repeat(np.arange(60), 3))
    train, held = hold_out(examples, seed=0)
    sides = [{document(side, index)[0].__repr__() for index in range(len(side))} for side in (train, held)]
    assert not sides[0] & sides[1]
    assert len(train) + len(held) == 180
    alone = make_examples([8]).take([0, 0, 0])
    assert [len(side) for side in hold_out(alone, seed=0)] == [3, 3]
