"""Which files of a hub data set hold its training rows."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import DataError
from trainer_node.engine.data.splits import training_files

SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        ([*SHARDS, "data/test-00000-of-00001.parquet", "README.md"], SHARDS),
        (["train/a.jsonl", "validation/a.jsonl"], ["train/a.jsonl"]),
        (["my_train.csv", "my_dev.csv"], ["my_train.csv"]),
        (["b.json", "a.json", ".hidden.json", "dataset_infos.json"], ["a.json", "b.json"]),
        (["constraints.json"], ["constraints.json"]),  # no word of it is a split
        ([*SHARDS, "train.csv"], SHARDS),  # the same rows twice
        (["train.csv", "train.jsonl"], ["train.jsonl"]),
    ],
)
def test_by_name(paths: list[str], found: list[str]) -> None:
    assert training_files(paths, None) == found


@pytest.mark.parametrize(
    "data_files",
    [
        [{"split": "train", "path": "x/train-*"}, {"split": "test", "path": "y/*"}],
        [{"split": "train", "path": ["x/train-1.parquet"]}],
        {"train": "x/*.parquet", "test": "y/*"},
        "x/**/*.parquet",
        ["x/train-1.parquet"],
    ],
)
def test_the_card_goes_before_names(data_files: Any) -> None:
    paths = ["x/train-1.parquet", "y/train-1.parquet"]
    assert training_files(paths, [{"config_name": "all", "data_files": data_files}]) == ["x/train-1.parquet"]


def test_the_default_configuration_is_read() -> None:
    paths = ["en/train.json", "de/train.json"]
    configs: list[dict[str, Any]] = [
        {"config_name": "de", "data_dir": "de"},
        {"config_name": "en", "default": True, "data_dir": "en"},
    ]
    assert training_files(paths, configs) == ["en/train.json"]
    with pytest.raises(DataError, match=r"several configurations and no default one \(de, fr\)"):
        training_files(paths, [configs[0], {"config_name": "fr"}])


@pytest.mark.parametrize(
    ("paths", "configs", "message"),
    [
        (["README.md", "model.bin"], None, "no data file that could be read"),
        (["test.json", "valid.json"], None, "none of its 2 data files is the training split"),
        (["a.json"], [{"data_files": [{"split": "test", "path": "*"}]}], "no split called train, only test"),
    ],
)
def test_what_is_there_instead_is_said(paths: list[str], configs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        training_files(paths, configs)
