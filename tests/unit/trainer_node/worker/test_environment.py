"""What a worker gets of its node's environment."""

from __future__ import annotations

import pytest

from trainer_node.worker.environment import worker_environment

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
    }


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
