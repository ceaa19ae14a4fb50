"""What a worker gets of its node's environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.settings import Settings
from trainer_node.worker.environment import ALLOCATORS, remarks, worker_environment

NODE = {
    "PATH": "/bin",
    "HOME": "/home/podium",
    "LC_ALL": "C.UTF-8",
    "https_proxy": "http://proxy",
    "NO_PROXY": "localhost",
    "HF_HOME": "/models",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "7",
    "OMP_NUM_THREADS": "64",
    "HF_TOKEN": "secret",
    "HUGGINGFACE_HUB_TOKEN": "secret",
    "HF_TOKEN_PATH": "/secret",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "TRITON_API_KEY": "secret",
    "WANDB_API_KEY": "secret",
    "PODIUM_NATS_NKEY_SEED_FILE": "/etc/podium/keys",
    "SSH_AUTH_SOCK": "/tmp/agent",
}


def test_libraries_get_theirs_and_nobody_a_secret() -> None:
    found = worker_environment(NODE, 3, "0,1")
    assert found == {
        "PATH": "/bin",
        "HOME": "/home/podium",
        "LC_ALL": "C.UTF-8",
        "https_proxy": "http://proxy",
        "NO_PROXY": "localhost",
        "HF_HOME": "/models",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "OMP_NUM_THREADS": "3",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def test_temporary_files_are_its_own_and_kernels_stay() -> None:
    found = worker_environment(NODE, 3, None, temporary=Path("/node/tmp"))
    assert (found["TMPDIR"], found["TORCHINDUCTOR_CACHE_DIR"]) == ("/node/tmp", "/node/compiled")
    own = worker_environment({"TORCHINDUCTOR_CACHE_DIR": "/cache"}, 3, None, temporary=Path("/node/tmp"))
    assert own["TORCHINDUCTOR_CACHE_DIR"] == "/cache"


@pytest.mark.parametrize("name", ALLOCATORS)
def test_an_operator_s_way_to_allocate_stays(name: str) -> None:
    found = worker_environment({**NODE, name: "max_split_size_mb:512"}, 3, None)
    assert {known: found[known] for known in ALLOCATORS if known in found} == {name: "max_split_size_mb:512"}


def test_an_operator_s_word_on_huge_pages_reaches_workers() -> None:
    assert worker_environment({"THP_MEM_ALLOC_ENABLE": "0"}, 3, None)["THP_MEM_ALLOC_ENABLE"] == "0"


def test_without_gpus_of_its_own_it_sees_the_nodes() -> None:
    assert worker_environment(NODE, 3, None)["CUDA_VISIBLE_DEVICES"] == "7"


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY"])
def test_an_operator_can_let_one_pass(name: str) -> None:
    assert worker_environment(NODE, 3, None, (name,))[name] == "secret"


def test_the_settings_never_pass() -> None:
    assert not [
        name
        for name in worker_environment(NODE, 3, None, ("PODIUM_NATS_NKEY_SEED_FILE",))
        if name.startswith("PODIUM_")
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, []),
        ({"worker_environment": ("HF_TOKEN",)}, []),
        ({"worker_environment": ("HF_TOKEN", "NO_SUCH")}, ["NO_SUCH, but this node has no such variable"]),
        ({"worker_environment": ("PODIUM_NATS_NKEY_SEED_FILE",)}, ["never gets settings of Podium"]),
        ({"worker_environment": ("HF_TOKEN",), "artifacts_kind": "hub"}, ["hub_token_file"]),
        ({"worker_environment": ("HF_TOKEN",), "artifacts_kind": "hub", "hub_token_file": "/t"}, []),
    ],
)
def test_what_is_wrong_is_said(settings: dict[str, Any], words: list[str]) -> None:
    found = remarks(NODE, Settings(**settings))
    assert len(found) == len(words)
    assert all(word in remark for word, remark in zip(words, found, strict=True))
