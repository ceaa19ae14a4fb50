from __future__ import annotations

import json

import pytest

from podium.commands.offer import check_data, read_offer
from podium.commands.up import EXAMPLES

WORDNET = EXAMPLES / "wordnet"


@pytest.mark.parametrize(("name", "train", "test"), [("nouns", 3503, 285), ("others", 1497, 115)])
def test_training_rows_and_held_out_rows_are_disjoint(name: str, train: int, test: int) -> None:
    rows = {part: json.loads((WORDNET / f"{name}_{part}.json").read_text()) for part in ("train", "test")}
    assert (len(rows["train"]), len(rows["test"])) == (train, test)
    pairs = {part: {(row["instruct"], row["output"]) for row in rows[part]} for part in rows}
    assert not pairs["train"] & pairs["test"]


def test_licence_comes_with_the_data() -> None:
    assert "Princeton University" in (WORDNET / "LICENSE").read_text()


@pytest.mark.parametrize("name", ["offer", "offer_chat", "offer_dpo"])
def test_example_offers_can_be_sent_as_they_are(name: str) -> None:
    assert "has the columns" in check_data(read_offer(EXAMPLES / f"{name}.json"))
