"""Conversations in the forms in which data sets hold them, pairs, and settings that don't fit the data."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow
import pyarrow.parquet

from bench.harness.dataset_types import SHAREGPT
from bench.rows.case import Case
from bench.rows.json_cases import QA, ROWS, dumped
from shared.messages.offers import DatasetType, TaskType

OPENAI = DatasetType(chat_column="messages", chat_role_field="role", chat_content_field="content")
PAIR = DatasetType(field_prompt="p", field_chosen="c", field_rejected="r")


def talk(
    first: Any = "Hello", second: Any = "Good day", roles: tuple[str, str] = ("human", "gpt")
) -> list[Any]:
    """Return a conversation of two turns."""
    return [{"from": roles[0], "value": first}, {"from": roles[1], "value": second}]


def talked(first: str = "Hello", second: str = "Good day") -> tuple[str, str]:
    """Return what chatml makes of it, and what is scored."""
    return f"<|im_start|>user\n{first}<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n", second


def chat(name: str, rows: list[Any], settings: DatasetType = SHAREGPT, **rest: Any) -> Case:
    """Return a case of conversations."""
    content = rest.pop("content", None) or dumped(rows)
    return Case(name=name, content=content, settings=settings, task_type=TaskType.CHAT, **rest)


def pair(name: str, rows: list[Any], **rest: Any) -> Case:
    """Return a case of preference pairs."""
    return Case(name=name, content=dumped(rows), settings=PAIR, task_type=TaskType.DPO, **rest)


def lists_of(messages: list[dict[str, str]]) -> bytes:
    """Return a Parquet file whose messages are an object of lists, as `datasets` stores them."""
    lists = {field: [message[field] for message in messages] for field in messages[0]}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"conversations": [lists]}), file)
    return file.getvalue()


PLAIN = {"conversations": talk()}
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
TEXT_PARTS = [{"type": "text", "text": "Good"}, {"type": "text", "text": "day"}]
IMAGE_PARTS = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "x"}}]

CHATS = (
    chat("sharegpt.json", [PLAIN], right=(talked(),)),
    chat("openai.json", [{"messages": MESSAGES}], OPENAI, right=(talked(),)),
    chat(
        "openai_fields_unnamed.json",
        [{"messages": MESSAGES}],
        DatasetType(chat_column="messages"),
        right=(talked(),),
    ),
    chat(
        "system_turn.json",
        [{"conversations": [{"from": "system", "value": "Be kind."}, *talk()], "system": "Unused."}],
        right=(("<|im_start|>system\nBe kind.<|im_end|>\n" + talked()[0], "Good day"),),
    ),
    chat(
        "system_column.json",
        [{**PLAIN, "system": "Be kind."}],
        right=(("<|im_start|>system\nBe kind.<|im_end|>\n" + talked()[0], "Good day"),),
    ),
    chat(
        "content_list.json",
        [PLAIN, {"conversations": talk(second=TEXT_PARTS)}, {"conversations": talk(second=["Good", "day"])}],
        right=(talked(), talked(second="Good\nday"), talked(second="Good\nday")),
    ),
    chat(
        "image_part.json",
        [PLAIN, {"conversations": talk(first=IMAGE_PARTS)}],
        right=(talked(),),
        dropped={"a message with a part that is not text": 1},
    ),
    chat("number_content.json", [{"conversations": talk(second=7)}], right=(talked(second="7"),)),
    chat(
        "null_content.json",
        [PLAIN, {"conversations": talk(second=None)}],
        right=(talked(),),
        dropped={"a message without text in 'from' or 'value'": 1},
    ),
    chat("as_text.json", [{"conversations": json.dumps(talk())}], right=(talked(),)),
    chat(
        "as_text.csv",
        [],
        content=b'id,conversations\n1,"' + json.dumps(talk()).replace('"', '""').encode() + b'"\n',
        right=(talked(),),
    ),
    chat(
        "half_in_text.json",
        [{"conversations": json.dumps(talk(second="cut \ud83d"))}],
        right=(talked(second="cut \ufffd"),),
    ),
    chat("object_of_lists.parquet", [], content=lists_of(talk()), right=(talked(),)),
    chat(
        "columns_of_conversations.json",
        [],
        content=dumped({"conversations": [talk(), talk("Hi")]}),
        right=(talked(), talked("Hi")),
        notices=("holds columns, not rows: 2 rows",),
    ),
    chat("one_conversation.json", [], content=dumped(PLAIN, indent=1), right=(talked(),)),
    chat(
        "nan_in_message.json",
        [{"conversations": [{**turn, "weight": float("nan")} for turn in talk()]}],
        right=(talked(),),
    ),
    chat(
        "half_in_message.json",
        [{"conversations": talk(second="cut \ud83d")}],
        right=(talked(second="cut \ufffd"),),
        notices=("half a character",),
    ),
)

UNMET = (
    chat(
        "human_gpt.json",
        [PLAIN],
        DatasetType(
            chat_column="conversations", chat_user_reference="user", chat_assistant_reference="assistant"
        ),
        refusal="no message of the role 'assistant' (1, first row 1); the roles are 'human', 'gpt': name two "
        "in chat_user_reference and chat_assistant_reference",
    ),
    chat(
        "openai_keys.json",
        [{"messages": MESSAGES}],
        refusal="no row has the column 'conversations'; the columns of row 1 are 'messages'; for "
        "conversations in 'messages' set chat_column to 'messages', and chat_role_field and "
        "chat_content_field",
    ),
    chat(
        "other_fields.json",
        [{"conversations": MESSAGES}],
        refusal="the messages have 'role', 'content': name two in chat_role_field and chat_content_field",
    ),
    chat(
        "misspelt_user.json",
        [{"conversations": talk(roles=("human", "gpt"))}],
        DatasetType(chat_user_reference="humann", chat_assistant_reference="gpt"),
        right=(("<|im_start|>human\nHello<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n", "Good day"),),
        notices=("no message has the role 'humann' (chat_user_reference); the roles are 'human', 'gpt'",),
    ),
    chat(
        "no_list.json",
        [{"conversations": "hello"}],
        refusal="column 'conversations' is not a list of messages",
    ),
    Case(
        name="typo_column_name.json",
        content=dumped(ROWS),
        settings=DatasetType(field_instruction="q"),  # what is left of a setting `field_outptu`
        right=tuple((question[0], question[1:]) for question, _ in QA),
        notices=("no field_output is named: the text of 'q' is trained as it is, without 'a'",),
    ),
    Case(
        name="misspelt_input.json",
        content=dumped([{**row, "context": "Here."} for row in ROWS]),
        settings=DatasetType(field_instruction="q", field_output="a", field_input="contxt"),
        right=QA,
        notices=("no row has the column 'contxt' (field_input), so it is left out; the columns of row 1",),
    ),
    Case(
        name="misspelt_system.json",
        content=dumped([{**row, "persona": "Here."} for row in ROWS]),
        settings=DatasetType(field_instruction="q", field_output="a", field_system="person"),
        right=QA,
        notices=("'q', 'a', 'persona'; is 'persona' meant?",),
    ),
)

PAIRS = (
    pair(
        "pair.json",
        [{"p": "Say", "c": "yes", "r": "no"}],
        right=(("Say", "yes"), ("Say", "no")),
    ),
    pair(
        "pair_of_numbers.json",
        [{"p": 1, "c": 2, "r": True}, {"p": 1, "c": None, "r": 3}],
        right=(("1", "2"), ("1", "True")),
        dropped={"column 'c' is missing": 1},
    ),
    pair("pair_without_rejected.json", [{"p": "Say", "c": "yes"}], refusal="no row has the column 'r'"),
)

CASES = (*CHATS, *UNMET, *PAIRS)
